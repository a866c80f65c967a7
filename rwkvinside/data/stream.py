"""A source that is read while training runs: blocks of tokens on disk, each made once, in the source's order.

With its tokens a block keeps the position in the source after it, so any process that needs the next block, now or
after a kill, continues from there. Any number of processes may use a stream: one writes and the others read; a lock
that dies with its holder decides which. Rows are a pure function of the seed, their number and the blocks, and so of
the source.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import threading
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..support.sealed import sealed_text, unsealed
from ..support.system import lock_file
from .batch import Batch
from .defaults import MAX_LINE_BYTES
from .encode import Encoder, chunks
from .readers import DocumentReader, name_skipped
from .rows import DocumentRows, Row, collate
from .token_store import StoreWriter, TokenStore, entry_key, is_whole, open_store, read_meta, writing
from .tokenize import source_identity

AHEAD = 2  # blocks made before they are asked for
POLL = 0.1  # seconds between looks at the disk
END = "end.json"  # says how many blocks there are, once that is known
PATIENCE = 1.0  # seconds that a process which must first find its position in the source lets others write


class TokenStream:
    """The blocks of a source; a thread of this process reads ahead until `close`.

    Args:
        source: see `DocumentReader`.
        encoder: makes tokens.
        cache_dir: the blocks are in a directory below it.
        block_tokens: a block ends with the chunk of documents in which this many tokens are reached.
        text_column: field that holds a text.
        max_line_bytes: a longer line of a file is refused.
        val_fraction: share of the documents, chosen by their hash, that is not trained on.
        masks: respect the loss masks of the documents; False: every token may be a target.
        check: called with the first block when the stream is opened; raises what is wrong with it.

    Attributes:
        fingerprint: changes with the source, the tokenizer, what is held out or masked, and the first block's content.
        closed: whether no more blocks will be made.

    Raises:
        UserError: the first block cannot be made.
    """

    def __init__(
        self,
        source: str,
        encoder: Encoder,
        *,
        cache_dir: Path,
        block_tokens: int,
        text_column: str = "text",
        max_line_bytes: int = MAX_LINE_BYTES,
        val_fraction: float = 0.0,
        masks: bool = True,
        check: Callable[[TokenStore], None] | None = None,
    ):
        self.source, self.encoder, self.text_column = source, encoder, text_column
        self.block_tokens, self.val_fraction, self.masks = block_tokens, val_fraction, masks
        self.max_line_bytes = max_line_bytes
        identity = {"source": source_identity(source), "text_column": text_column, "block_tokens": block_tokens}
        name_skipped(source)
        self.directory = cache_dir / f"{entry_key(identity | encoder.identity)}.stream"
        self._made = 0  # complete blocks, from the first on
        self._requested = 0
        self.closed = False
        self._change = threading.Condition()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._read_ahead, name="read ahead", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread that works while Python ends may bring it down
        try:
            first = self.block(0)
            if first is None:
                raise UserError(
                    f"the tokenizer finds no token in {source}", "check the data and that the tokenizer fits it"
                )
            if check is not None:
                check(first)
        except BaseException:
            self.close()
            raise
        content = [read_meta(self.entry(0))["sha256"], val_fraction, masks]
        self.fingerprint = hashlib.sha256(json.dumps([self.directory.name, content]).encode()).hexdigest()[:32]

    def block(self, number: int) -> TokenStore | None:
        """Return all documents of a block, None after the end; wait until it is made.

        Raises:
            UserError: the source cannot be read, or the block cannot be written.
        """
        with self._change:
            self._requested = max(self._requested, number)
            self._change.notify_all()
            while number >= self._count_made():
                if (end := self._end()) is not None and number >= end:
                    return None
                if self._failure is not None:
                    raise self._failure
                if self.closed:
                    raise RuntimeError("the stream is closed")
                self._change.wait(POLL)
        block = open_store(self.entry(number))
        return block if self.masks else block.without_masks()

    def training(self, number: int) -> TokenStore | None:
        """Return the documents of a block that are not held out, None after the end."""
        block = self.block(number)
        return block if block is None else block.select(np.flatnonzero(~block.held_out(self.val_fraction)))

    def validation(self) -> TokenStore:
        """Return the held-out documents of the first block, which may be none."""
        block = self.block(0)
        return block.select(np.flatnonzero(block.held_out(self.val_fraction)))

    def close(self) -> None:
        """Stop reading ahead; a block that is not finished is dropped."""
        with self._change:
            self.closed = True
            self._change.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=30)
        atexit.unregister(self.close)

    def entry(self, number: int) -> Path:
        """Return the directory of a block, whether it exists or not."""
        return self.directory / f"block-{number:06d}"

    def _count_made(self) -> int:
        with self._change:  # both threads count
            while self.entry(self._made).exists() and is_whole(self.entry(self._made)):
                self._made += 1
            return self._made

    def _end(self) -> int | None:
        """Return the number of blocks, None while it is not known."""
        try:
            return unsealed((self.directory / END).read_text(encoding="utf-8"))["blocks"]
        except (OSError, ValueError, KeyError):  # missing or damaged: the end is found again
            return None

    def _next(self) -> int | None:
        """Return the number of the block to make now, None if there are enough."""
        number, end = self._count_made(), self._end()
        return None if number > self._requested + AHEAD or (end is not None and number >= end) else number

    def _read_ahead(self) -> None:
        """Make blocks until the stream is closed."""
        writer = _BlockWriter(self)
        try:
            while not self.closed:
                with self._change:
                    if (number := self._next()) is None:
                        self._change.wait()
                        continue
                    if number and number != writer.position:
                        self._change.wait(PATIENCE)
                with _locked(self.directory) as locked:
                    while locked and not self.closed and (number := self._next()) is not None:
                        writer.write(number)
                        with self._change:
                            self._change.notify_all()
                if not locked:
                    with self._change:
                        self._change.wait(POLL)
        except Exception as error:  # raised where a block is waited for
            self._failure = error


class _BlockWriter:
    """Writer of the blocks of a stream, which keeps its position in the source.

    Attributes:
        position: the block that can be made without a search for its position, None at first.
    """

    def __init__(self, stream: TokenStream):
        self.stream = stream
        self.position: int | None = None
        self._reader: DocumentReader | None = None
        self._chunks: Iterator = iter(())

    def write(self, number: int) -> None:
        """Make a block, or note that the source ends before it.

        Writes nothing when the stream is closed meanwhile.
        """
        stream = self.stream
        if self.position != number:
            cursor = read_meta(stream.entry(number - 1))["cursor"] if number else None
            self._reader = DocumentReader(stream.source, stream.text_column, cursor, stream.max_line_bytes)
            self._chunks = chunks(self._reader)
        self.position, ended = None, False  # no position until all went well
        with writing(stream.entry(number)) as unfinished, StoreWriter(unfinished) as writer:
            while writer.tokens < stream.block_tokens and not ended:
                chunk = next(self._chunks, None)
                if stream.closed:
                    return
                ended = chunk is None
                for document in stream.encoder(chunk or []):
                    writer.add(document)
            if writer.documents:
                writer.finish({"cursor": self._reader.cursor()})
        if ended:
            with writing(stream.directory / END) as unfinished:
                unfinished.write_text(sealed_text({"blocks": number + bool(writer.documents)}), encoding="utf-8")
        self.position = number + 1


@contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Yield whether this process holds the directory's lock, until it leaves or dies."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / "lock").open("w") as file:
            try:
                lock_file(file.fileno(), wait=False)
            except BlockingIOError:
                yield False
            else:
                yield True
    except OSError as error:
        raise UserError(
            f"tokens cannot be written below {str(directory)!r} ({error.strerror or error})",
            "free some space or choose another directory: data.cache_dir=DIR",
        ) from error


class StreamedRows:
    """Rows of a stream, block after block; after the last block the next epoch.

    The documents of each block are shuffled anew in each epoch.

    Args:
        stream: the blocks.
        make: makes the rows of one block from its documents and a seed.
        seed: decides the order within the blocks.

    Attributes:
        rows_per_epoch: infinite, because it is not known before the end.
        tokens_per_row: mean over the first block.
        seq_len: tokens of the longest row.
    """

    rows_per_epoch = float("inf")

    def __init__(
        self,
        stream: TokenStream,
        make: Callable[[TokenStore, int], DocumentRows],
        seed: int,
    ):
        self.stream, self.seed = stream, seed
        self._make = make
        self._rows = lru_cache(maxsize=4)(self._rows_of)
        self._starts = [0]  # number of each block's first row, then that of the block not seen yet
        self._whole = False  # whether all blocks have been seen
        if (first := self._rows(0)) is None:
            raise UserError(
                f"a validation split of {stream.val_fraction:g} takes all of the first block of {stream.source}",
                "give a validation source (--val), or raise data.block_tokens",
            )
        self.tokens_per_row, self.seq_len = first.tokens_per_row, first.seq_len

    def _rows_of(self, block: int) -> DocumentRows | None:
        """Return the rows of a block, None if all its documents are held out."""
        store = self.stream.training(block)
        seed = zlib.crc32(f"{self.seed} {block}".encode())
        return self._make(store, seed) if store.num_documents else None

    def _place(self, i: int) -> tuple[DocumentRows, int]:
        """Return the rows of the block that contains row i, and its number there."""
        while not self._whole and i >= self._starts[-1]:
            block = len(self._starts) - 1
            if self.stream.block(block) is None:
                self._whole = True
            else:
                rows = self._rows(block)
                self._starts.append(self._starts[-1] + (rows.rows_per_epoch if rows else 0))
        epoch, i = divmod(i, self._starts[-1]) if self._whole else (0, i)
        block = bisect_right(self._starts, i) - 1
        rows = self._rows(block)
        return rows, epoch * rows.rows_per_epoch + i - self._starts[block]

    def tokens_in(self, rows: int) -> int:
        """Return the tokens of the first `rows` rows, estimated from the first block."""
        return round(rows * self.tokens_per_row)

    def row(self, i: int) -> Row:
        """Return the arrays of row i, see `PackedRows.row`."""
        rows, number = self._place(i)
        return rows.row(number)

    def batch(self, rows: Iterable[int]) -> Batch:
        """Return the rows with these numbers, padded to the longest of them."""
        rows = tuple(rows)
        return collate([self.row(i) for i in rows], rows)
