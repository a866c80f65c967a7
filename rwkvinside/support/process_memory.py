"""Memory of this process as the system counts it: pages in RAM."""

from __future__ import annotations

import ctypes
import platform
import re
import sys
from pathlib import Path

MMAP_THRESHOLD = 2**17  # bytes; glibc's own, before it starts to raise it
LARGE = 50_000_000  # parameters from which memory matters more than the time to clear new pages

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def return_freed_memory(parameters: int) -> None:
    """Let glibc give blocks back to the system as soon as they are freed.

    Lasts for the rest of this process; does nothing for a model of fewer than `LARGE` parameters, and without glibc.
    Otherwise glibc keeps blocks of up to 32 MiB in heaps that activations of all sizes cut to pieces: 42 % more than
    what is in use was measured for a student of 57 million parameters. It costs the clearing of new pages, up to 15 %
    of a step at a width of 512, less the more products are made of each page.
    """
    if parameters >= LARGE and platform.libc_ver()[0] == "glibc":
        mmap_threshold = -3  # the option's number in malloc.h
        ctypes.CDLL(None).mallopt(mmap_threshold, MMAP_THRESHOLD)


def peak_bytes() -> int:
    """Return the most bytes that were in RAM at once.

    Counted since the process started or since `forget_peak`. On Linux this is VmHWM, because getrusage carries the peak
    of the process that started this one through exec; elsewhere it is getrusage, on Windows the peak working set.
    """
    if _STATUS.exists() and (match := re.search(rb"VmHWM:\s+(\d+) kB", _STATUS.read_bytes())):  # gVisor has none
        return 1024 * int(match[1])
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> bool:
    """Let `peak_bytes` count anew from what is in RAM now.

    See man 5 proc, clear_refs.

    Returns:
        Whether the system does that; Linux does.
    """
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def release_freed_memory() -> None:
    """Give pages that were freed back to the system, so that a peak counted from now on is that of new work.

    Does nothing without glibc, whose heap would otherwise keep them.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
