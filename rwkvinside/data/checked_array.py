"""Arrays on disk whose blocks are checked when they are first used."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import UserError

BLOCK = 1 << 20  # bytes; a row is a few KB of one, and checking it takes about as long as reading it


class Checksums:
    """CRC-32 of each block of what is written piece by piece.

    Attributes:
        blocks: of the whole blocks so far.
    """

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self._crc = self._filled = 0

    def update(self, content: bytes) -> None:
        """Add the next bytes."""
        view = memoryview(content)
        while view:
            part = view[: BLOCK - self._filled]
            self._crc, self._filled, view = zlib.crc32(part, self._crc), self._filled + len(part), view[len(part) :]
            if self._filled == BLOCK:
                self.blocks.append(self._crc)
                self._crc = self._filled = 0

    def finish(self) -> list[int]:
        """Return the checksums of all blocks, the last of which may be short."""
        return [*self.blocks, self._crc] if self._filled else self.blocks


class CheckedArray:
    """A file as a one-dimensional array, to be sliced; a block is read and checked at its first use.

    Args:
        path: of the file.
        dtype: of the elements.
        checksums: see `Checksums`.
        advice: what to do with a damaged file, for the message.

    Raises:
        UserError: the file is missing or empty.
    """

    def __init__(self, path: Path, dtype: type[np.generic], checksums: Sequence[int], advice: str):
        self.path, self.advice = path, advice
        try:
            self._bytes = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}", advice) from error
        self._values = self._bytes.view(dtype)
        self._checksums = checksums
        self._checked = np.zeros(len(checksums), dtype=bool)

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: slice) -> np.ndarray:
        """Return elements from start to stop.

        Raises:
            UserError: a block of them is not what was written.
        """
        start, stop, _ = index.indices(len(self))
        if stop > start:
            size = self._values.itemsize
            self._check(start * size // BLOCK, (stop * size - 1) // BLOCK + 1)
        return self._values[start:stop]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        """Return all elements, for numpy."""
        values = self[:]
        return values.astype(dtype or values.dtype, copy=bool(copy))

    def _check(self, first: int, last: int) -> None:
        for block in first + np.flatnonzero(~self._checked[first:last]):
            begin = int(block) * BLOCK
            if zlib.crc32(self._bytes[begin : begin + BLOCK]) != self._checksums[block]:
                end = min(begin + BLOCK, len(self._bytes))
                raise UserError(f"{self.path} is damaged between its bytes {begin:,} and {end:,}", self.advice)
            self._checked[block] = True
