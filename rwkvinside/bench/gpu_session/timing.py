"""Times of short functions, on a GPU by its own clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def synchronize(device: str) -> None:
    """Wait until a device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(function: Callable[[], object], device: str, repeats: int = 20, warmup: int = 3) -> float:
    """Return the median time of a function, by CUDA events or, on a CPU, by the clock.

    Args:
        function: starts work on the device.
        device: "cuda" or "cpu".
        repeats: measured calls.
        warmup: calls before them.
    """
    for _ in range(warmup):
        function()
    if device == "cpu":
        return statistics.median(_clock(function) for _ in range(repeats))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def _clock(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)
