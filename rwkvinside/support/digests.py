"""Digests of large files, computed once and remembered as long as a file does not change."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

from .files import file_digest, write_json
from .progress import Progress
from .sealed import read_sealed, sealed

THREADS = 4  # hashing runs outside of Python's lock; more than a disk can feed is of no use


class FileDigests:
    """SHA-256 of files by path.

    A file is read again only when its size, time of change or inode is another one than when it was read last.

    Args:
        file: where they are remembered; missing, damaged or edited it counts as empty. None: nowhere else.
    """

    def __init__(self, file: Path | None = None):
        self._file = file
        self._new = False

    @cached_property
    def _known(self) -> dict[str, dict]:
        """What is remembered, read when it is needed first: another process may write it until then."""
        return {} if self._file is None else _read(self._file)

    def of(self, path: Path) -> str:
        """Return the digest of a file.

        Raises:
            OSError: it cannot be read.
        """
        path = path.resolve()
        facts = _facts(path)
        known = self._known.get(str(path))
        if known is not None and {name: known[name] for name in facts} == facts:
            return known["sha256"]
        digest = file_digest(path)
        self._known[str(path)] = facts | {"sha256": digest}  # as it was before it was read: a later change shows
        self._new = True
        return digest

    def of_all(self, paths: Iterable[Path]) -> list[str]:
        """Return the digests of files, several of which are read at a time."""
        _ = self._known  # once, before several threads ask for it
        files, digests = list(paths), []
        with ThreadPoolExecutor(THREADS) as pool, Progress("hashing", len(files), unit="files") as progress:
            for digest in pool.map(self.of, files):
                digests.append(digest)
                progress.advance()
        return digests

    def save(self) -> None:
        """Remember what was computed, for the next process.

        Raises:
            UserError: no space, or the directory cannot be written.
        """
        if self._file is not None and self._new:
            write_json(self._file, sealed({"files": self._known}))
            self._new = False


def _facts(path: Path) -> dict[str, int]:
    """Return what changes with a file's content, without reading it."""
    stat = os.stat(path)
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "inode": stat.st_ino}


def _read(file: Path) -> dict[str, dict]:
    try:
        return read_sealed(file)[0]["files"]
    except (ValueError, KeyError):
        return {}
