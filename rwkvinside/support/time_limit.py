"""An end to Python code that may not end by itself, in any thread."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class TimeExceeded(BaseException):
    """What is inside a `time_limit` takes too long; no `Exception`, so that what it interrupts does not swallow it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeExceeded` in this thread when what is inside takes longer.

    It is raised between two steps of Python: a single long call of a C function ends first.
    """
    thread, lock, state = ctypes.c_ulong(threading.get_ident()), threading.Lock(), {"running": True, "expired": False}

    def expire() -> None:
        with lock:
            if state["running"]:
                state["expired"] = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(TimeExceeded))

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            state["running"] = False
            if state["expired"]:  # and perhaps not raised yet: it must not be raised in what follows
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, None)
        timer.cancel()
