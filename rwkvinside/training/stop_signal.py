"""A request to end from outside, heard in the main thread while training runs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from ..support.system import signals

Handler = Callable[[int, FrameType | None], object] | int | None
ENDING = signals("SIGTERM", "SIGHUP")  # of a scheduler, and of a terminal that was closed


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise KeyboardInterrupt within the block, as SIGINT does by itself.

    What is ignored, as SIGHUP under `nohup`, stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread alone
        return
    before = {number: signal.getsignal(number) for number in heard(ENDING)}
    for number in before:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def heard(numbers: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Return which of some signals are not ignored."""
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


class StopSignal:
    """Notes the first SIGTERM, SIGHUP or SIGINT within the `with` block.

    A second one is handled as before the block; SIGTERM and SIGHUP that are ignored stay so.

    Attributes:
        received: number of the signal that came, None so far.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._handlers: dict[int, Handler] = {}

    def __enter__(self) -> StopSignal:
        self._handlers = {number: signal.getsignal(number) for number in (*heard(ENDING), signal.SIGINT)}
        for number in self._handlers:
            signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
