"""Memory of this process as the system counts it: pages in RAM. Needs the standard library alone."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak_bytes() -> int:
    """The most bytes that were in RAM at once, since the process started or since `forget_peak`.

    Linux: VmHWM, because getrusage carries the peak of the process that started this one through exec. Where there
    is no such line getrusage has to do.
    """
    if _STATUS.exists() and (found := re.search(rb"VmHWM:\s+(\d+) kB", _STATUS.read_bytes())):  # gVisor has none
        return 1024 * int(found[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> bool:
    """From now on `peak_bytes` counts anew, beginning with what is in RAM now (man 5 proc: clear_refs).

    Returns:
        Whether the system does that; Linux does.
    """
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True
