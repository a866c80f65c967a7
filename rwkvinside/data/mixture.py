"""Several sources in one stream of rows, each with its share of the tokens, whatever the size of the source.

The source of a row is a pure function of the row's number: the golden-ratio sequence falls into each source's interval
in proportion to its length, to within a few rows at any point. A source that is used up begins its next epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np

from .batch import Batch
from .rows import Row, collate

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio
BLOCK = 1 << 16  # rows whose sources are computed together


class Rows(Protocol):
    """Rows that can be mixed: `PackedRows`, `WholeDocuments` or `StreamedRows`."""

    seq_len: int

    @property
    def tokens_per_row(self) -> float:
        """Mean number of tokens of a row."""

    def row(self, i: int) -> Row:
        """Return the arrays of row i."""

    def tokens_in(self, rows: int) -> int:
        """Return the tokens of the first `rows` rows."""


class MixedRows:
    """Rows of several sources, mixed by tokens.

    Args:
        parts: rows of each source, endless.
        weights: share of the tokens of each source; any positive numbers.
        seed: decides where the sequence begins.

    Attributes:
        rows_per_epoch: infinite; there is no number of rows after which all sources begin anew.
        seq_len: tokens of the longest row.
    """

    rows_per_epoch = float("inf")

    def __init__(self, parts: Sequence[Rows], weights: Sequence[float], seed: int):
        if len(parts) != len(weights):
            raise ValueError(f"{len(parts)} parts, {len(weights)} weights")
        self.parts, self.seed, self.seq_len = parts, seed, parts[0].seq_len
        # shares of the tokens become shares of the rows
        shares = np.array(weights, dtype=np.float64) / [part.tokens_per_row for part in parts]
        # 2^64 does not fit uint64; the last source gets what is left
        self._bounds = (np.cumsum(shares / shares.sum())[:-1] * 2.0**64).astype(np.uint64)
        self._before = [np.zeros(len(parts), dtype=np.int64)]  # rows of each source before every block
        self._block = lru_cache(maxsize=4)(self._make_block)

    def _make_block(self, block: int) -> np.ndarray:
        """Return the source of each row, (BLOCK,) int32."""
        numbers = np.arange(block * BLOCK, (block + 1) * BLOCK, dtype=np.uint64)
        points = (numbers + np.uint64(self.seed)) * np.uint64(GOLDEN)  # modulo 2^64
        return np.searchsorted(self._bounds, points, side="right").astype(np.int32)

    def counts(self, rows: int) -> np.ndarray:
        """Return how many of the first `rows` rows each source has, (sources,) int64."""
        block, rest = divmod(rows, BLOCK)
        while len(self._before) <= block:
            in_block = np.bincount(self._block(len(self._before) - 1), minlength=len(self.parts))
            self._before.append(self._before[-1] + in_block)
        return self._before[block] + np.bincount(self._block(block)[:rest], minlength=len(self.parts))

    def place(self, i: int) -> tuple[int, int]:
        """Return the source of row i and its number there."""
        block, rest = divmod(i, BLOCK)
        source = int(self._block(block)[rest])
        return source, int(self.counts(i)[source])

    def tokens_of(self, rows: int) -> list[int]:
        """Return the tokens that each source has in the first `rows` rows."""
        return [part.tokens_in(int(count)) for part, count in zip(self.parts, self.counts(rows), strict=True)]

    def row(self, i: int) -> Row:
        """Return the arrays of row i, see `PackedRows.row`."""
        source, number = self.place(i)
        return self.parts[source].row(number)

    def batch(self, rows: Iterable[int]) -> Batch:
        """Return the rows with these numbers, padded to the longest of them."""
        rows = tuple(rows)
        return collate([self.row(i) for i in rows], rows)
