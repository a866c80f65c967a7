"""What operating systems and machines do differently, in one place.

Imports on every system. Uses the standard library only, because the installation and the kernels need it too.
"""

from __future__ import annotations

import os
import signal
import time

from ..errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

WINDOWS = os.name == "nt"
NO_MPS = "no support for Apple's GPUs, as the recurrence has no kernel for them; use cpu"
FAR = 2**30  # where a byte is locked on Windows, whose locks keep others from reading it


def lock_file(descriptor: int, *, wait: bool) -> None:
    """Lock an open file for this process; the lock ends with the process, or when the file is closed.

    Args:
        descriptor: of the file, on Windows not of a directory.
        wait: until another process lets go of it.

    Raises:
        BlockingIOError: another process holds it, and this one does not wait.
        OSError: the file system has no locks.
    """
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return
    import msvcrt

    at = os.lseek(descriptor, 0, os.SEEK_CUR)
    os.lseek(descriptor, FAR, os.SEEK_SET)
    try:
        while True:
            try:
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
                return
            except PermissionError as error:
                if not wait:
                    raise BlockingIOError(error.errno, "held by another process") from error
            time.sleep(0.1)
    finally:
        os.lseek(descriptor, at, os.SEEK_SET)


def check_device(name: str) -> None:
    """Refuse a device on which nothing here runs.

    Raises:
        UserError: it is one of Apple's GPUs.
    """
    if name.split(":")[0] == "mps":
        raise UserError(f"device {name}: {NO_MPS}")


def signals(*names: str) -> tuple[signal.Signals, ...]:
    """Return the signals of these names that this system has."""
    return tuple(signal.Signals[name] for name in names if name in signal.Signals.__members__)
