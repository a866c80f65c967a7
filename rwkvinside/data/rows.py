"""From tokenized documents to rows and batches.

A row is a pure function of the seed and the row's number, so any row can be made at any time, a data cursor is one
integer, and ranks need not communicate.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch

from .batch import IGNORE, Batch
from .tokenize import TokenStore

Piece = tuple[int, int, int]  # document, first token, token after the last
Row = dict[str, np.ndarray]


class PackedRows:
    """Rows of `seq_len` tokens, filled without gaps.

    The documents of an epoch are concatenated in an order drawn from (seed, epoch) and cut every `seq_len` tokens. A
    document that is cut continues in the next row as a segment whose positions restart; its last token in the first row
    still has its target. So in one epoch every token is an input exactly once and every token but the first of a
    document is a target exactly once. Only the last row of an epoch has padding.

    Args:
        tokens: the documents.
        seq_len: tokens of a row.
        seed: decides the order.
    """

    def __init__(self, tokens: TokenStore, seq_len: int, seed: int):
        if seq_len < 2:
            raise ValueError(f"seq_len {seq_len} leaves no token to predict")
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self.rows_per_epoch = -(-tokens.num_tokens // seq_len)
        self._lengths = tokens.lengths
        # Rows of one batch may be on both sides of the end of an epoch.
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the documents in order and where each ends in the epoch, both int64."""
        order = document_order(self.seed, epoch, self.tokens.num_documents)
        return order, np.cumsum(self._lengths[order])

    def pieces(self, i: int) -> list[Piece]:
        """Return the pieces of row i (counted through all epochs from 0), in order."""
        epoch, row = divmod(i, self.rows_per_epoch)
        order, ends = self._epoch(epoch)
        start = row * self.seq_len
        stop = min(start + self.seq_len, int(ends[-1]))
        pieces = []
        for place in range(int(np.searchsorted(ends, start, side="right")), len(order)):
            document, end = int(order[place]), int(ends[place])
            begin = end - int(self._lengths[document])
            if begin >= stop:
                break
            pieces.append((document, max(start - begin, 0), min(stop, end) - begin))
        return pieces

    @property
    def tokens_per_row(self) -> float:
        """Mean tokens of a row, without padding."""
        return self.tokens_in(self.rows_per_epoch) / self.rows_per_epoch

    def tokens_in(self, rows: int) -> int:
        """Return the tokens of the first `rows` rows."""
        epochs, rest = divmod(rows, self.rows_per_epoch)
        return epochs * self.tokens.num_tokens + min(rest * self.seq_len, self.tokens.num_tokens)

    def row(self, i: int) -> Row:
        """Return the arrays of row i, each (seq_len,), see `Batch`.

        These are input_ids, labels and position_ids in int64 and segment_ids in int32.
        """
        return _lay_out(self.tokens, self.pieces(i), self.seq_len)

    def batch(self, rows: Iterable[int]) -> Batch:
        """Return the rows with these numbers, (len(rows), seq_len)."""
        rows = tuple(rows)
        return collate([self.row(i) for i in rows], rows)


class ContinuedRows:
    """The rows of `PackedRows` in another order, in which row i + R goes on where row i ends.

    So a step of R rows reads R streams, not one stretch of a long document. In each lap, which is about an epoch, every
    stream reads its own stretch of S = ceil(packed rows / R) packed rows; a lap begins where the one before ended, and
    no token comes twice before all have come.

    Args:
        packed: the rows.
        streams: R, rows of a step.
        run_on: positions run on in a row that goes on with a document, counted from where the stream began to read it;
            False: they restart, as in `PackedRows`.
    """

    def __init__(self, packed: PackedRows, streams: int, run_on: bool):
        self.packed, self.streams, self.run_on, self.seq_len = packed, streams, run_on, packed.seq_len
        self.stretch = -(-packed.rows_per_epoch // streams)
        self.rows_per_epoch = self.stretch * streams

    @property
    def tokens_per_row(self) -> float:
        """Mean tokens of a row, without padding."""
        return self.packed.tokens_per_row

    def tokens_in(self, rows: int) -> int:
        """Return the tokens of the first `rows` rows."""
        laps, rest = divmod(rows, self.rows_per_epoch)
        total = self.packed.tokens_in(laps * self.rows_per_epoch)
        for stream in range(self.streams):
            begin = self._place(laps * self.rows_per_epoch + stream)[0]
            read = -(-(rest - stream) // self.streams)
            total += self.packed.tokens_in(begin + read) - self.packed.tokens_in(begin)
        return total

    def pieces(self, i: int) -> list[Piece]:
        """Return the pieces of row i, in order."""
        return self.packed.pieces(self._place(i)[0])

    def row(self, i: int) -> Row:
        """Return the arrays of row i, see `PackedRows.row`."""
        number, begin = self._place(i)
        row = self.packed.row(number)
        if self.run_on and number > begin:
            document, start, stop = self.packed.pieces(number)[0]
            row["position_ids"][: stop - start] += start - self._offset(document, number, begin)
        return row

    def batch(self, rows: Iterable[int]) -> Batch:
        """Return the rows with these numbers, (len(rows), seq_len)."""
        rows = tuple(rows)
        return collate([self.row(i) for i in rows], rows)

    def is_first(self, i: int) -> bool:
        """Return whether row i is of the first epoch of the packed rows, beyond which the first lap may reach."""
        return self._place(i)[0] < self.packed.rows_per_epoch

    def _place(self, i: int) -> tuple[int, int]:
        """Return the packed row of row i, and the one with which its stream began the lap."""
        step, stream = divmod(i, self.streams)
        lap, place = divmod(step, self.stretch)
        begin = lap * self.rows_per_epoch + stream * self.stretch
        return begin + place, begin

    def _offset(self, document: int, number: int, begin: int) -> int:
        """Return the first token of a document that the stream has read."""
        epoch = self.packed.rows_per_epoch
        first, start, _ = self.packed.pieces(begin)[0]
        return start if document == first and number // epoch == begin // epoch else 0


class ShuffledRows:
    """The rows of `PackedRows`, those of an epoch in an order drawn from (seed, epoch).

    So neighboring steps do not read one stretch of a long document.

    Args:
        packed: the rows.
    """

    def __init__(self, packed: PackedRows):
        self.packed, self.seq_len, self.rows_per_epoch = packed, packed.seq_len, packed.rows_per_epoch
        # another seed than that of the documents' order
        self._order = lru_cache(maxsize=2)(lambda epoch: document_order(packed.seed + 1, epoch, packed.rows_per_epoch))

    @property
    def tokens_per_row(self) -> float:
        """Mean tokens of a row, without padding."""
        return self.packed.tokens_per_row

    def tokens_in(self, rows: int) -> int:
        """Return the tokens of the first `rows` rows, of which each epoch's shortest comes anywhere in it."""
        epochs, rest = divmod(rows, self.rows_per_epoch)
        padding = self.rows_per_epoch * self.seq_len - self.packed.tokens.num_tokens
        short = self.rows_per_epoch - 1 in self._order(epochs)[:rest]
        return epochs * self.packed.tokens.num_tokens + rest * self.seq_len - short * padding

    def pieces(self, i: int) -> list[Piece]:
        """Return the pieces of row i, in order."""
        return self.packed.pieces(self._place(i))

    def row(self, i: int) -> Row:
        """Return the arrays of row i, see `PackedRows.row`."""
        return self.packed.row(self._place(i))

    def batch(self, rows: Iterable[int]) -> Batch:
        """Return the rows with these numbers, (len(rows), seq_len)."""
        rows = tuple(rows)
        return collate([self.row(i) for i in rows], rows)

    def _place(self, i: int) -> int:
        """Return the packed row of row i."""
        epoch, place = divmod(i, self.rows_per_epoch)
        return epoch * self.rows_per_epoch + int(self._order(epoch)[place])


class WholeDocuments:
    """Rows of several whole documents each, for sft, whose documents must not be cut where they can be kept whole.

    Which documents share a row is decided once (`whole_rows`); the rows of an epoch come in an order drawn from (seed,
    epoch). A document of more than `seq_len` tokens is cut, and alone in its row. Rows end with their last document.

    Args:
        tokens: the documents.
        seq_len: tokens of the longest row.
        seed: decides the order.
    """

    def __init__(self, tokens: TokenStore, seq_len: int, seed: int):
        if seq_len < 2:
            raise ValueError(f"seq_len {seq_len} leaves no token to predict")
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self._rows = whole_rows(tokens.lengths, seq_len)
        self._tokens = np.array([np.minimum(tokens.lengths[row], seq_len).sum() for row in self._rows])
        self.rows_per_epoch = len(self._rows)
        self._order = lru_cache(maxsize=2)(lambda epoch: document_order(seed, epoch, self.rows_per_epoch))

    def pieces(self, i: int) -> list[Piece]:
        """Return the documents of row i (counted through all epochs from 0), in order."""
        epoch, place = divmod(i, self.rows_per_epoch)
        return [(document, 0, self.seq_len) for document in self._rows[self._order(epoch)[place]]]

    @property
    def tokens_per_row(self) -> float:
        """Mean tokens of a row."""
        return float(self._tokens.mean())

    def tokens_in(self, rows: int) -> int:
        """Return the tokens of the first `rows` rows, without padding."""
        epochs, rest = divmod(rows, self.rows_per_epoch)
        return int(epochs * self._tokens.sum() + self._tokens[self._order(epochs)[:rest]].sum())

    def row(self, i: int) -> Row:
        """Return arrays as long as the documents of row i, see `PackedRows.row`."""
        return _lay_out(self.tokens, self.pieces(i))

    def batch(self, rows: Iterable[int]) -> Batch:
        """Return the rows with these numbers, padded to the longest of them."""
        rows = tuple(rows)
        return collate([self.row(i) for i in rows], rows)


DocumentRows = PackedRows | ContinuedRows | ShuffledRows | WholeDocuments


def whole_rows(lengths: np.ndarray, seq_len: int) -> list[list[int]]:
    """Return which whole documents share a row: the longest first, each where the least space is left that it fits.

    Args:
        lengths: tokens of each document, (documents,); what is beyond `seq_len` does not count.
        seq_len: tokens of a row.
    """
    rows: list[list[int]] = []
    left: dict[int, list[int]] = {}  # rows by the tokens that they still take
    sizes: list[int] = []  # the keys of `left`, ascending
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = min(int(lengths[document]), seq_len)
        at = bisect_left(sizes, length)
        if at < len(sizes):
            space = sizes[at]
            row = left[space].pop()
            if not left[space]:
                del left[sizes.pop(at)]
        else:
            space, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(document)
        if space > length:
            if space - length not in left:
                insort(sizes, space - length)
            left.setdefault(space - length, []).append(row)
    return rows


class PaddedDocuments:
    """Rows of one document each in the documents' order, padded on the right, for evaluation.

    Args:
        tokens: the documents.
        max_len: tokens of the longest row; longer documents are cut.

    Attributes:
        num_truncated, num_truncated_tokens: how many documents are cut, and how many tokens are lost.
    """

    def __init__(self, tokens: TokenStore, max_len: int):
        if max_len < 2:
            raise ValueError(f"max_len {max_len} leaves no token to predict")
        self.tokens, self.seq_len = tokens, max_len
        self.rows_per_epoch = tokens.num_documents
        excess = np.maximum(tokens.lengths - max_len, 0)
        self.num_truncated = int((excess > 0).sum())
        self.num_truncated_tokens = int(excess.sum())

    def __len__(self) -> int:
        return self.rows_per_epoch

    def pieces(self, i: int) -> list[Piece]:
        """Return the one piece of row i."""
        if not 0 <= i < self.rows_per_epoch:
            raise IndexError(f"row {i} of {self.rows_per_epoch} documents")
        return [(i, 0, self.seq_len)]

    def row(self, i: int) -> Row:
        """Return arrays as long as the document (at most max_len), see `PackedRows.row`."""
        return _lay_out(self.tokens, self.pieces(i))

    def batch(self, rows: Iterable[int]) -> Batch:
        """Return the rows with these numbers, padded to the longest of them."""
        rows = tuple(rows)
        return collate([self.row(i) for i in rows], rows)


def document_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """Return a permutation of range(count) (int64) from (seed, epoch).

    It is made from the raw output of the bit generator, which numpy keeps stable over its versions, unlike
    `permutation`.
    """
    return np.argsort(np.random.PCG64([seed, epoch]).random_raw(count), kind="stable")


def _lay_out(tokens: TokenStore, pieces: Sequence[Piece], length: int | None = None) -> Row:
    ids, labels = zip(*(tokens.piece(*piece) for piece in pieces), strict=True)
    sizes = [len(part) for part in ids]
    row = {
        "input_ids": np.concatenate(ids),
        "labels": np.concatenate(labels),
        "position_ids": np.concatenate([np.arange(size) for size in sizes]),
        "segment_ids": np.repeat(np.arange(1, len(sizes) + 1, dtype=np.int32), sizes),
    }
    return row if length is None else _pad(row, length)


def _pad(row: Row, length: int) -> Row:
    """Pad with token 0, position 0, segment 0 and no target."""
    missing = length - len(row["input_ids"])
    fill = {"labels": IGNORE}
    return {name: np.pad(values, (0, missing), constant_values=fill.get(name, 0)) for name, values in row.items()}


def collate(rows: Sequence[Row], numbers: tuple[int, ...]) -> Batch:
    """Return a batch of these rows, padded to the longest of them."""
    length = max(len(row["input_ids"]) for row in rows)
    padded = [_pad(row, length) for row in rows]
    return Batch(**{name: torch.from_numpy(np.stack([r[name] for r in padded])) for name in rows[0]}, rows=numbers)


def document_batches(documents: PaddedDocuments, *, batch_tokens: int = 8192) -> Iterator[Batch]:
    """Yield batches of documents of similar length, longest first.

    That order makes running out of memory show at once.

    Args:
        documents: one document per row, in their own order.
        batch_tokens: at most this many positions per batch, padding included; a longer document has its own batch.
    """
    lengths = np.minimum(documents.tokens.lengths, documents.seq_len)
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        count = max(1, batch_tokens // int(lengths[order[start]]))
        yield documents.batch(order[start : start + count].tolist())
        start += count
