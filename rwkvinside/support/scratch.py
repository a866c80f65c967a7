"""A place to prepare a file or a directory that several processes may write at once."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .files import UNFINISHED
from .system import WINDOWS, lock_file


@contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """Yield an empty directory next to `target`, of this process alone; it is removed at the end.

    What killed processes left there for the same target is removed first. A process holds a lock on its directory as
    long as it lives, which ends with it, on whatever machine it is. Windows locks no directories: what is left stays.

    Args:
        target: what is to be prepared. The directories above it are made.

    Raises:
        OSError: the directory cannot be made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{_literal(target.name)}.????????{UNFINISHED}"):
        _remove_abandoned(left)
    folder, lock = _locked_directory(target)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked_directory(target: Path) -> tuple[Path, int | None]:
    """Return a new directory and the descriptor that holds its lock, None where there are no such locks."""
    while True:
        folder = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}{UNFINISHED}")
        folder.mkdir()
        if WINDOWS:
            return folder, None
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # another process took it for abandoned before it was locked
            continue
        _lock(descriptor, wait=True)
        if folder.exists():
            return folder, descriptor
        os.close(descriptor)


def _remove_abandoned(path: Path) -> None:
    """Remove what no living process holds."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # its process has just finished; Windows: it cannot be known
        return
    try:
        if not _lock(descriptor, wait=False):
            return
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Return whether a descriptor's file is locked now; False: another process holds it, or nobody knows."""
    try:
        lock_file(descriptor, wait=wait)
    except OSError:  # held, or a file system without locks
        return False
    return True


def _literal(name: str) -> str:
    """Return a pattern that only this name fits."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)
