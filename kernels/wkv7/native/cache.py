"""The library compiled on first use, in a directory that only this user can write to, and whole before it is loaded."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import stat
import subprocess
from pathlib import Path

from rwkvinside.support.files import file_digest, remove_unfinished, write_text
from rwkvinside.support.system import lock_file

from .build import CompileError, compile_library, find_compiler, source_hash

log = logging.getLogger(__name__)


def cached_library() -> Path:
    """Return the library in ~/.cache/rwkvinside/native, compiling it if it is missing or not what was compiled.

    Its name is a hash of sources, flags and compiler. Its SHA-256 lies next to it. Processes wait for each other.

    Raises:
        CompileError: it cannot be compiled or kept, or others can write where it would be kept.
    """
    try:
        folder = Path.home() / ".cache" / "rwkvinside" / "native"
    except RuntimeError as error:
        raise CompileError(f"there is no place for the compiled kernel: {error}") from error
    try:
        name = f"wkv7-{platform.machine()}-{_build_hash()}.so"  # first of all: there may be no compiler
        _claim(folder)
        target = folder / name
        if _is_whole(target):
            return target
        return _build(target)
    except OSError as error:
        raise CompileError(f"the compiled kernel cannot be kept in {folder}: {error.strerror or error}") from error


def _build(target: Path) -> Path:
    with open(target.with_suffix(".lock"), "w") as lock:
        lock_file(lock.fileno(), wait=True)
        if not _is_whole(target):  # another process may have built it meanwhile
            if target.exists():
                log.warning("the compiled kernel %s is not what was compiled and is made again", target)
            remove_unfinished(target.parent)
            target.unlink(missing_ok=True)
            compile_library(target)
            target.chmod(0o700)
            write_text(_note(target), file_digest(target))
    return target


def _claim(folder: Path) -> None:
    """Make the directory, or check that it is this user's alone.

    Raises:
        CompileError: it belongs to another user, or others may have put files there.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or not _is_own(found):
        raise CompileError(f"{folder} is not a directory that this user alone can write to: remove it")
    if stat.S_IMODE(found.st_mode) != 0o700:  # made by an earlier version, readable for others
        folder.chmod(0o700)


def _is_whole(library: Path) -> bool:
    """Return whether a library and the note of its SHA-256 are this user's, and it is what was compiled."""
    try:
        files = [file.lstat() for file in (library, _note(library))]
        own = all(stat.S_ISREG(found.st_mode) and _is_own(found) for found in files)
        return own and file_digest(library) == _note(library).read_text(encoding="ascii")
    except (FileNotFoundError, UnicodeDecodeError):
        return False


def _is_own(found: os.stat_result) -> bool:
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _note(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _build_hash() -> str:
    """Return a hash of sources, flags, and the compiler with its version."""
    compiler = find_compiler()
    answer = subprocess.run([*compiler, "--version"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return hashlib.sha256(repr((source_hash(), compiler, answer.stdout)).encode()).hexdigest()[:16]
