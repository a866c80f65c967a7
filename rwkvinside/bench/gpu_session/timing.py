"""Times of short functions, on a GPU by its own clock.

In a dry run, on a CPU, every function is called once to warm up and once by the clock: the numbers mean nothing.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch

AHEAD = 2.0  # times the host's work that the device's must be, so that the device never waits
TURN = 2.0  # milliseconds of work between two events where it would


def synchronize(device: str) -> None:
    """Wait until a device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(function: Callable[[], object], device: str, repeats: int = 20, warmup: int = 3) -> float:
    """Return the median time of a function as the device sees it, waiting for the host included.

    Args:
        function: starts work on the device.
        device: "cuda" or "cpu".
        repeats: measured calls.
        warmup: calls before them.
    """
    if device == "cpu":
        function()
        return 1e3 * _clock(function)
    for _ in range(warmup):
        function()
    return _by_events(function, repeats)


def launch_milliseconds(function: Callable[[], object], device: str, repeats: int = 20) -> float:
    """Return the median time of a function without what the host takes to issue it.

    What the device does in less than `AHEAD` times the host's own time is replayed as a CUDA graph of several calls.

    Args:
        function: launches kernels, and neither allocates memory nor waits.
        device: "cuda" or "cpu".
        repeats: measured calls, or replays of a graph.
    """
    if device == "cpu":
        return milliseconds(function, device)
    function()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(3):
        function()
    host = 1e3 * (time.perf_counter() - began) / 3
    once = _by_events(function, 3)
    if once > AHEAD * host:
        return _by_events(function, repeats)
    count = min(50, max(1, math.ceil(TURN / max(once, 1e-3))))
    graph = captured(lambda: [function() for _ in range(count)])
    graph.replay()
    return _by_events(graph.replay, repeats) / count


def captured(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Return what a function launches as a CUDA graph; the function has run before and allocates nothing.

    `torch.cuda.graph` also collects garbage and empties the allocator's cache, which takes longer than most
    measurements here.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin()
        try:
            function()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


def host_microseconds(function: Callable[[], object], device: str, calls: int = 20) -> float:
    """Return the time that the host needs to issue a function."""
    function()
    synchronize(device)
    calls = calls if device == "cuda" else 1
    seconds = _clock(lambda: [function() for _ in range(calls)])
    synchronize(device)
    return 1e6 * seconds / calls


def _by_events(function: Callable[[], object], repeats: int) -> float:
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in pairs:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def _clock(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
