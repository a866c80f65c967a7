"""A directory that one process at a time may write to.

The lock is the operating system's: it ends with the process, so a killed one leaves nothing to clean up.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import UserError
from .system import lock_file

LOCK = ".lock"  # says who holds it; gone when nobody does, except after a kill and on Windows

logger = logging.getLogger(__name__)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a directory for this process.

    It is made if missing, and removed again if nothing was put into it.

    Raises:
        UserError: another process holds it (names it), or it cannot be written.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        descriptor = _acquire(directory)
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror or error}", "name another directory") from error
    try:
        yield
    finally:
        with suppress(PermissionError):  # Windows: nobody can remove an open file
            (directory / LOCK).unlink(missing_ok=True)  # still held: whoever opened this file looks for the next one
        os.close(descriptor)
        with suppress(OSError):  # something is in it
            for path in made:
                path.rmdir()


def entries(directory: Path) -> list[Path]:
    """Return what is in a directory besides its lock."""
    return [path for path in directory.iterdir() if path.name != LOCK]


def _acquire(directory: Path) -> int:
    """Return the open file of a lock that this process holds."""
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # its last holder has just removed the directory
            continue
        try:
            _lock(descriptor, directory)
            if _is_current(descriptor, directory / LOCK):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, directory: Path) -> None:
    try:
        lock_file(descriptor, wait=False)
    except BlockingIOError as error:
        holder = os.read(descriptor, 300).decode(errors="replace").strip() or "another process"
        raise UserError(f"{directory} is in use by {holder}", "wait until it has ended, or stop it") from error
    except OSError as error:  # a file system without locks
        logger.warning("%s cannot be locked (%s): see to it that one process uses it", directory, error.strerror)


def _is_current(descriptor: int, path: Path) -> bool:
    """Return whether an open file still has its name, which its last holder has taken away when it ended."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
