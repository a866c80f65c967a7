"""A command in a process of its own that begins at once: forked from one that has imported what commands need."""

import ctypes
import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path

PRELOAD = [
    "rwkvinside.cli.main",
    "rwkvinside.conversion.run",
    "rwkvinside.conversion.write_logits",
    "rwkvinside.data.tokenize",
    "rwkvinside.evaluate.compare",
    "rwkvinside.export.verify",
    "rwkvinside.export.huggingface",
    "rwkvinside.planning.plan",
    "rwkvinside.planning.fitting",
    "transformers.models.qwen3.modeling_qwen3",
    "command_process",
]


def start(argv, log, **limits):
    """Start `rwkvinside` with arguments; what it prints goes into a file.

    Args:
        argv: arguments.
        log: file, replaced.
        limits: see `_run`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=_run, args=([str(word) for word in argv], Path(log)), kwargs=limits)
    process.start()
    return process


def finish(process, patience=600):
    """Wait for its end; return the exit code, negative for a signal."""
    process.join(patience)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(f"the command hung for {patience} seconds")
    return process.exitcode


def _run(argv, log, file_bytes=None, powerless=False):
    """Run the command.

    Args:
        argv, log: see `start`.
        file_bytes: no file can become longer, as if the disk were full.
        powerless: without the capabilities of root, who may write everywhere.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    if file_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    if powerless:
        version, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        if ctypes.CDLL(None, use_errno=True).capset(version, none):
            raise OSError(ctypes.get_errno(), "capset")
    from rwkvinside.cli.main import main

    sys.exit(main(argv))
