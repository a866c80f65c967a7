"""What a piece of work costs: seconds and the most memory at once, both measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from ..support.process_memory import forget_peak, peak_bytes, release_freed_memory

Result = TypeVar("Result")


@dataclass(frozen=True)
class Cost:
    """Of one piece of work.

    Attributes:
        seconds: until the device was done.
        peak_bytes: the most memory at once beyond what was in use before: of the GPU's allocator, else pages of this
            process in RAM; None where the system cannot count anew (only Linux can).
    """

    seconds: float
    peak_bytes: int | None


def measured(
    work: Callable[[], Result], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> tuple[Result, Cost]:
    """Do some work on a device; return its result and what it cost.

    What is loaded on first use counts as well: do a piece of the work before.

    Args:
        work: to be done.
        device: where it is done.
        clock: that counts seconds, such as `time.process_time`.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before, counts = torch.cuda.memory_allocated(device), True
    else:
        release_freed_memory()
        counts = forget_peak()
        before = peak_bytes()
    result, seconds = timed(work, device, clock)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_bytes()
    return result, Cost(seconds, peak - before if counts else None)


def timed(
    work: Callable[[], Result], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> tuple[Result, float]:
    """Do some work on a device; return its result and the seconds until the device was done, by a clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, clock() - start
