"""Times of GPU work: medians of events, with a CUDA graph where the host would be what is measured."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch

REPEATS = 20
TURN = 2e-3  # seconds of work between two events, so that short kernels are not all gap


def eager_ms(call: Callable[[], object], device: str, repeats: int = REPEATS) -> float:
    """Return the median milliseconds of a call as the device sees it."""
    call()
    if device != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    torch.cuda.synchronize()
    return _events(call, 1, repeats)


def graph_ms(call: Callable[[], object], device: str, repeats: int = REPEATS) -> float:
    """Return the median milliseconds of a call that is captured once and replayed: no host time in it."""
    if device != "cuda":
        return eager_ms(call, device)
    call()
    torch.cuda.synchronize()
    once = _events(call, 1, 3)
    count = min(50, max(1, math.ceil(1e3 * TURN / max(once, 1e-3))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            call()
    graph.replay()
    torch.cuda.synchronize()
    return _events(graph.replay, 1, repeats) / count


def host_us(call: Callable[[], object], device: str, calls: int = 20) -> float:
    """Return the microseconds that the host needs to issue a call."""
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    else:
        calls = 1
    start = time.perf_counter()
    for _ in range(calls):
        call()
    elapsed = time.perf_counter() - start
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e6 * elapsed / calls


def _events(call: Callable[[], object], count: int, repeats: int) -> float:
    pairs = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(count):
            call()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) / count
