"""Renders chat templates, which are programs of whoever made a tokenizer, in a process with bounds.

Executed by path (`python render_template.py SECONDS BYTES`), see `support/bounded_process.py`. A question has the
template, the messages, and options of transformers' `render_jinja_template`. The answer has "text" and "spans", the
characters within {% generation %} tags, or "refusal": name and words of the error.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Timer

LATE = 124  # `bounded_process.LATE`


def main(seconds: str, memory: str) -> None:
    """Answer questions until there are no more."""
    from transformers.utils.chat_template_utils import render_jinja_template

    with suppress(ImportError, OSError, ValueError):  # a system without such a limit, or one that is lower already
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + int(memory), resource.getrlimit(resource.RLIMIT_AS)[1]))
    for line in sys.stdin.buffer:
        with ended_after(float(seconds)):
            try:
                answer = json.dumps(answer_to(line, render_jinja_template)).encode() + b"\n"
            except MemoryError:
                os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
        sys.stdout.buffer.write(answer)
        sys.stdout.buffer.flush()


@contextmanager
def ended_after(seconds: float) -> Iterator[None]:
    """End this process if the block takes longer: in processor time, or by the clock where nothing measures that."""
    if hasattr(signal, "setitimer"):
        # its default action ends a process that is in the middle of a call into C
        signal.setitimer(signal.ITIMER_PROF, seconds)
        yield
        signal.setitimer(signal.ITIMER_PROF, 0)
        return
    timer = Timer(seconds, os._exit, [LATE])
    timer.start()
    yield
    timer.cancel()


def answer_to(line: bytes, render) -> dict:
    """Return the answer to a question."""
    question = json.loads(line)
    try:
        (text,), spans = render(conversations=[question["messages"]], **question["options"])
        if len(text) > 10 * len(line) + 1_000_000:  # it would have to be tokenized
            raise OverflowError(f"it makes {len(text):,} characters of {len(line):,}")
        return {"text": text, "spans": spans[0] if spans else []}
    except MemoryError:
        raise
    except Exception as error:  # a template may raise whatever it likes
        return {"refusal": [type(error).__name__, str(error)]}


if __name__ == "__main__":
    main(*sys.argv[1:])
