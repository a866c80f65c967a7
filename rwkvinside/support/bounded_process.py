"""Work that may take any time and memory, in a process that the system bounds: questions in, answers out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from threading import Lock

from .system import signals

LATE = 124  # exit code of a script that has measured itself that its time is over


class OutOfBounds(Exception):
    """An answer took more time or memory than it may; says which."""


class BoundedProcess:
    """A script that answers questions, one JSON object a line each way; started when the first is asked.

    What exceeds its bounds ends the process, in the middle of a call into C too, and the next question starts another.
    Any thread may ask.

    Args:
        script: run as `python SCRIPT SECONDS BYTES`; it sets these bounds for itself, for each answer.
        seconds: of processor time, so that a busy or a suspended machine changes nothing; on Windows by the clock.
        memory: bytes, in addition to what the script takes by itself; Windows sets no bound.
    """

    def __init__(self, script: Path, seconds: float, memory: int):
        self.script, self.seconds, self.memory = script, seconds, memory
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, question: dict) -> dict:
        """Return the answer to a question.

        Raises:
            OutOfBounds: there is none within the bounds.
        """
        with self._lock:
            process, self._process = (
                self._process or self._start(),
                None,
            )  # not to be asked again before it has answered
            try:
                answer = _exchange(process, json.dumps(question).encode())
            except BaseException:
                process.kill()
                process.communicate()
                raise
            if answer:
                self._process = process
                return json.loads(answer)
            process.communicate()
            raise OutOfBounds(self._reason(process.returncode))

    def _start(self) -> subprocess.Popen[bytes]:
        # -P: what lies beside the script hides no module; a session of its own: Ctrl-C is for this process alone
        return subprocess.Popen(
            [sys.executable, "-P", str(self.script), str(self.seconds), str(self.memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _reason(self, code: int) -> str:
        if code == LATE or -code in signals("SIGPROF"):
            return f"does not end within {self.seconds:g} seconds"
        if -code in signals("SIGKILL"):
            return f"needs more than {self.memory / 2**30:g} GiB of memory"
        raise RuntimeError(f"{self.script} has ended with {code}")


def _exchange(process: subprocess.Popen[bytes], question: bytes) -> bytes:
    """Return the line that answers a line, b"" where the process has ended instead."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(question + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        return b""
    return process.stdout.readline()


def bounded_process(script: Path, seconds: float, memory: int) -> BoundedProcess:
    """Return the process of a script that everything in this one shares; arguments are those of `BoundedProcess`."""
    return _of_process(script, seconds, memory, os.getpid())


@cache
def _of_process(script: Path, seconds: float, memory: int, owner: int) -> BoundedProcess:
    """Return the same by the process that asks: a fork must not share the pipes of its parent."""
    return BoundedProcess(script, seconds, memory)
