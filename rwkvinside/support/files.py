"""Files that are complete or absent.

They are written next to their place, flushed to the disk, then renamed. Uses the standard library only, because the
installation and the kernels need it too.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError
from .system import WINDOWS

MOST_TEXT = 10 * 10**6  # bytes of a text that a person has written
UNFINISHED = ".unfinished"  # the end of every temporary name, which begins with a dot


@contextmanager
def temporary_sibling(path: Path, *, unique: bool = False) -> Iterator[Path]:
    """Yield a name next to `path` for a file or a directory.

    What is left under that name at the end is removed.

    Args:
        path: what is to be written. The directories above it are made.
        unique: give each writer another name, where several processes may write the same file. Otherwise the name is
            always the same, and what a killed process left there is replaced.
    """
    token = f".{uuid.uuid4().hex[:8]}" if unique else ""
    temporary = path.with_name(f".{path.name}{token}{UNFINISHED}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if temporary.is_dir():
        shutil.rmtree(temporary)
    try:
        yield temporary
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def publish(temporary: Path, path: Path) -> None:
    """Flush a file or a whole directory to the disk, then rename it to `path`.

    A file replaces an existing one; a directory replaces an empty one only.
    """
    fsync_tree(temporary)
    rename(temporary, path)


def rename(source: Path, path: Path) -> None:
    """Rename what is on the disk already, within a directory, so that a power cut leaves one of the two names."""
    os.replace(source, path)
    fsync(path.parent)


@contextmanager
def replacing(path: Path, *, unique: bool = False) -> Iterator[Path]:
    """Yield a temporary name next to `path` that takes its place at the end.

    After an error nothing takes its place.

    Args:
        path, unique: see `temporary_sibling`.
    """
    with temporary_sibling(path, unique=unique) as temporary:
        yield temporary
        publish(temporary, path)


def remove_unfinished(directory: Path, names: str = "*") -> None:
    """Remove what killed processes left in a directory that only this one writes to.

    Args:
        names: glob pattern of the files or directories that were to be written.
    """
    for temporary in directory.glob(f".{names}{UNFINISHED}"):
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink()


def write_text(path: Path, text: str, hint: str = "free space, or make the directory writable") -> None:
    """Write a UTF-8 text file; a reader sees the old or the new one.

    Args:
        hint: what to do when it cannot be written.

    Raises:
        UserError: no space, or the directory cannot be written.
    """
    try:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}", hint) from error


def write_json(path: Path, values: dict, hint: str = "free space, or make the directory writable") -> None:
    """Write a JSON file, indented.

    Arguments and errors are those of `write_text`.
    """
    write_text(path, json.dumps(values, indent=2) + "\n", hint)


def read_lines(path: Path, what: str) -> list[str]:
    """Return the lines of a UTF-8 file that are not blank, without spaces around them.

    Args:
        path: of the file.
        what: its lines are, in the plural.

    Raises:
        UserError: it cannot be read, is not UTF-8, or is empty.
    """
    try:
        lines = [line.strip() for line in read_text(path).splitlines()]
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror}", "check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} are not UTF-8: {error.reason}", "give a text file") from error
    if not (found := [line for line in lines if line]):
        raise UserError(f"{what} {path} are empty", "give one per line")
    return found


def read_text(path: str | os.PathLike) -> str:
    """Return a UTF-8 text that a person has written, without a byte-order mark.

    Raises:
        OSError: it cannot be read, or has no end, as a device.
        UnicodeDecodeError: it is no such text.
    """
    with open(path, "rb") as file:
        content = file.read(MOST_TEXT + 1)
    if len(content) > MOST_TEXT:
        raise OSError(errno.EFBIG, f"more than {MOST_TEXT // 10**6} MB")
    return content.decode("utf-8-sig")


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def free_bytes(directory: Path) -> int:
    """Return the free space on the disk of a directory."""
    return shutil.disk_usage(directory).free


def fsync(path: Path) -> None:
    """Flush a file or the entries of a directory to the disk.

    After a power cut no half of it is left. Windows flushes files that may be written to, and no directories.
    """
    if WINDOWS and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(path: Path) -> None:
    """`fsync` a file, or a directory and everything below it."""
    if path.is_dir():
        for entry in path.iterdir():
            fsync_tree(entry)
    fsync(path)
