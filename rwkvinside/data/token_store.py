"""Token ids on disk, memory-mapped, and a selection of their documents. Knows no tokenizer, rows or order.

A store is a directory with tokens.bin (uint32, all documents one after another), offsets.npy (int64, documents + 1),
hashes.npy (uint64 of each document's content), loss.bin (uint8 per token, only where some carry no loss) and meta.json,
which is written last and holds the SHA-256 of the other files, a checksum of each block of the large ones, and a seal.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from ..errors import UserError
from ..support.files import file_digest, publish
from ..support.scratch import scratch
from ..support.sealed import sealed_text, unsealed
from .batch import IGNORE
from .checked_array import CheckedArray, Checksums

FORMAT = 3
META = "meta.json"
LARGE = {"tokens.bin": np.uint32, "loss.bin": np.uint8}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoded:
    """A tokenized document.

    Attributes:
        digest: 64 bits of a hash of its content.
        ids: uint32.
        loss: bool like ids, True = may be a target; None: all may.
        facts: things to count over all documents, such as its kind.
    """

    digest: int
    ids: np.ndarray
    loss: np.ndarray | None = None
    facts: tuple[str, ...] = ()


class Sliceable(Protocol):
    """A one-dimensional array, or what gives one for a slice."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice, /) -> np.ndarray: ...


class Joined:
    """Arrays that are sliced as if concatenated; only slices are copied."""

    def __init__(self, parts: Sequence[Sliceable]):
        self.parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: slice) -> np.ndarray:
        start, stop, _ = index.indices(len(self))
        first = int(np.searchsorted(self._ends, start, side="right"))
        slices = []
        for part, end in zip(self.parts[first:], self._ends[first:], strict=True):
            begin = int(end) - len(part)
            slices.append(part[max(start - begin, 0) : max(stop - begin, 0)])
            if stop <= end:
                break
        return np.concatenate(slices) if len(slices) != 1 else slices[0]


@dataclass(frozen=True)
class TokenStore:
    """Tokenized documents, or a selection of them.

    Attributes:
        tokens: integers, all tokens on disk.
        offsets: (documents on disk + 1,) int64, where each document begins in `tokens`.
        hashes: (documents on disk,) uint64 of each document's content.
        loss: uint8 like `tokens`, 1 = may be a target; None = all may.
        selected: int64 indices of the documents in this selection.
        fingerprint: changes when any token or the selection changes (for the data cursor of a checkpoint).
        max_id: the largest token id on disk.
        facts: counts over the documents on disk, see `Encoded`.
    """

    tokens: Sliceable
    offsets: np.ndarray
    hashes: np.ndarray
    loss: Sliceable | None
    selected: np.ndarray
    fingerprint: str
    max_id: int
    facts: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_documents(self) -> int:
        """Number of selected documents."""
        return len(self.selected)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each selected document, (num_documents,) int64."""
        return self.offsets[self.selected + 1] - self.offsets[self.selected]

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the selected documents."""
        return int(self.lengths.sum())

    def piece(self, document: int, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens [start, stop) of a document and their targets, both int64.

        A target is the document's next token, even past `stop`; it is -100 at the document's last token and before
        tokens that carry no loss.
        """
        first, end = self._bounds(document)
        a, b = first + start, end if stop is None else min(first + stop, end)
        ids = self.tokens[a:b].astype(np.int64)
        labels = np.full(b - a, IGNORE, dtype=np.int64)
        following = self.tokens[a + 1 : min(b + 1, end)]
        labels[: len(following)] = following
        if self.loss is not None:
            labels[: len(following)][self.loss[a + 1 : min(b + 1, end)] == 0] = IGNORE
        return ids, labels

    def has_targets(self, length: int | None = None) -> bool:
        """Return whether there is a token to predict.

        Args:
            length: tokens of each document that count; None: all.
        """
        if self.loss is None:
            return bool((self.lengths > 1).any())
        return any((self.piece(i, 0, length)[1] != IGNORE).any() for i in range(self.num_documents))

    def masked(self, document: int) -> np.ndarray:
        """Return a bool for each of a document's tokens, True = carries no loss."""
        first, end = self._bounds(document)
        return np.zeros(end - first, dtype=bool) if self.loss is None else self.loss[first:end] == 0

    def _bounds(self, document: int) -> tuple[int, int]:
        at = self.selected[document]
        return int(self.offsets[at]), int(self.offsets[at + 1])

    def select(self, documents: np.ndarray) -> TokenStore:
        """Return a store of only these documents, in this order.

        Args:
            documents: indices into this store.
        """
        selected = self.selected[documents]
        digest = hashlib.sha256(self.fingerprint.encode() + selected.tobytes()).hexdigest()[:32]
        return replace(self, selected=selected, fingerprint=digest)

    def first(self, tokens: int, *, reach: bool = False) -> TokenStore:
        """Return the first documents that hold at most this many tokens, at least one.

        Args:
            tokens: in these documents together.
            reach: include the document in which the number is reached.
        """
        side = "left" if reach else "right"
        count = max(1, int(np.searchsorted(np.cumsum(self.lengths), tokens, side=side)) + reach)
        return self if count >= self.num_documents else self.select(np.arange(count))

    def without_masks(self) -> TokenStore:
        """Return the same documents with every token as a possible target."""
        return self if self.loss is None else replace(self, loss=None, fingerprint=f"{self.fingerprint}-all")

    def held_out(self, fraction: float) -> np.ndarray:
        """Return a bool for each document, True = for validation.

        A hash of the content decides, so a document stays on its side when others are added, and equal documents are on
        the same side.
        """
        return self.hashes[self.selected] / 2.0**64 < fraction

    def split(self, fraction: float) -> tuple[TokenStore, TokenStore | None]:
        """Return (training, validation) documents, see `held_out`.

        Raises:
            UserError: one of the sides would be empty.
        """
        if fraction == 0:
            return self, None
        val = self.held_out(fraction)
        if not val.any() or val.all():
            raise UserError(
                f"a validation split of {fraction:g} takes {val.sum()} of {self.num_documents} documents",
                "give a validation source (--val), change data.val_fraction, or set it to 0",
            )
        return self.select(np.flatnonzero(~val)), self.select(np.flatnonzero(val))

    def check_vocab(self, vocab_size: int) -> None:
        """Refuse token ids beyond the teacher's vocabulary, see `check_vocab`."""
        check_vocab(self.max_id, vocab_size)


def join(stores: Sequence[TokenStore]) -> TokenStore:
    """Return the documents of several stores one after another."""
    if len(stores) == 1:
        return stores[0]
    loss = None
    if any(store.loss is not None for store in stores):
        one = np.ones(1, dtype=np.uint8)  # broadcast, a mask that lets all tokens through
        loss = Joined([np.broadcast_to(one, len(s.tokens)) if s.loss is None else s.loss for s in stores])
    documents = np.cumsum([0, *(len(store.hashes) for store in stores)])
    tokens = np.cumsum([0, *(len(store.tokens) for store in stores)])
    offsets = [store.offsets[:-1] + start for store, start in zip(stores, tokens[:-1], strict=True)]
    return TokenStore(
        tokens=Joined([store.tokens for store in stores]),
        offsets=np.concatenate([*offsets, tokens[-1:]]),
        hashes=np.concatenate([store.hashes for store in stores]),
        loss=loss,
        selected=np.concatenate([s.selected + start for s, start in zip(stores, documents[:-1], strict=True)]),
        fingerprint=hashlib.sha256(" ".join(store.fingerprint for store in stores).encode()).hexdigest()[:32],
        max_id=max(store.max_id for store in stores),
        facts=sum((Counter(store.facts) for store in stores), Counter()),
    )


class StoreWriter:
    """Writer of a store, document by document, to be completed by `finish`.

    Args:
        directory: created here.

    Attributes:
        max_id: the largest token id added so far.
    """

    def __init__(self, directory: Path):
        directory.mkdir()
        self.directory = directory
        self.max_id = 0
        self._offsets, self._hashes = array("q", [0]), array("Q")
        self._files = {name: (directory / name).open("wb") for name in LARGE}
        self._digests = {name: hashlib.sha256() for name in LARGE}
        self._checksums = {name: Checksums() for name in LARGE}
        self._masked = False
        self._facts: Counter[str] = Counter()

    @property
    def documents(self) -> int:
        """Number of documents added so far."""
        return len(self._hashes)

    @property
    def tokens(self) -> int:
        """Number of tokens added so far."""
        return self._offsets[-1]

    def add(self, document: Encoded) -> None:
        """Append a document."""
        ids, loss = document.ids, document.loss
        self.max_id = max(self.max_id, int(ids.max()))
        self._write("tokens.bin", ids.tobytes())
        self._write("loss.bin", (np.ones(len(ids), np.uint8) if loss is None else loss.astype(np.uint8)).tobytes())
        self._masked |= loss is not None
        self._offsets.append(self.tokens + len(ids))
        self._hashes.append(document.digest)
        self._facts.update(document.facts)

    def finish(self, meta: Mapping) -> None:
        """Complete the store.

        Args:
            meta: JSON values for meta.json, in addition to the counts.
        """
        self._close()
        if not self._masked:
            (self.directory / "loss.bin").unlink()
            del self._digests["loss.bin"], self._checksums["loss.bin"]
        np.save(self.directory / "offsets.npy", np.frombuffer(self._offsets, dtype=np.int64))
        np.save(self.directory / "hashes.npy", np.frombuffer(self._hashes, dtype=np.uint64))
        small = {name: file_digest(self.directory / name) for name in ("offsets.npy", "hashes.npy")}
        counts = {
            "documents": self.documents,
            "tokens": self.tokens,
            "max_id": self.max_id,
            "facts": dict(sorted(self._facts.items())),
            "sha256": {name: digest.hexdigest() for name, digest in self._digests.items()} | small,
            "blocks": {name: checksums.finish() for name, checksums in self._checksums.items()},
        }
        (self.directory / META).write_text(sealed_text({"format": FORMAT} | counts | dict(meta)), encoding="utf-8")

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_) -> None:
        self._close()

    def _close(self) -> None:
        for file in self._files.values():
            file.close()

    def _write(self, name: str, content: bytes) -> None:
        self._files[name].write(content)
        self._digests[name].update(content)
        self._checksums[name].update(content)


def entry_key(identity: Mapping) -> str:
    """Return the name of a cache entry, a hash of what it depends on."""
    return hashlib.sha256(json.dumps([FORMAT, identity], sort_keys=True).encode()).hexdigest()[:32]


def stats_of(files: Iterable[Path]) -> list:
    """Return JSON values that change when one of the files does, without reading them."""
    stats = [(file, file.stat()) for file in files]
    return [[str(file.resolve()), stat.st_size, stat.st_mtime_ns] for file, stat in stats]


@contextmanager
def writing(target: Path) -> Iterator[Path]:
    """Yield a temporary path next to `target`; move what is written there into place.

    Several processes may write the same target. After an error, and when a store was not finished, nothing is moved;
    what a killed process left for the same target is removed.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with scratch(target) as folder:
            unfinished = folder / target.name
            yield unfinished
            if unfinished.is_file():
                publish(unfinished, target)
            elif (unfinished / META).is_file():
                _publish_store(unfinished, target)
    except OSError as error:
        raise UserError(
            f"tokens cannot be written below {str(target.parent)!r} ({error.strerror or error})",
            "free some space or choose another directory: data.cache_dir=DIR",
        ) from error


def _publish_store(unfinished: Path, entry: Path) -> None:
    """Rename a store into place; a result that another process put there is as good."""
    if entry.exists() and not is_whole(entry):
        shutil.rmtree(entry)
    try:
        publish(unfinished, entry)
    except OSError:
        if not is_whole(entry):
            raise


def is_whole(entry: Path) -> bool:
    """Return whether a store exists undamaged; log a damaged one."""
    if not entry.exists():
        return False
    if problem := damage(entry):
        log.warning("token cache %s is damaged (%s) and is made again", entry, problem)
    return not problem


def damage(entry: Path, *, every_byte: bool = False) -> str:
    """Return what is wrong with the files of a store, "" if nothing.

    Args:
        entry: directory of the store.
        every_byte: check the content of the large files too, not only their sizes.
    """
    try:
        meta = read_meta(entry)
        if meta["format"] != FORMAT:
            return f"it has format {meta['format']}, this version reads {FORMAT}"
        sizes = {"tokens.bin": 4 * meta["tokens"], "loss.bin": meta["tokens"]}
        for name, digest in meta["sha256"].items():
            if name in sizes and (size := (entry / name).stat().st_size) != sizes[name]:
                return f"{name} has {size} bytes instead of {sizes[name]}"
            if (every_byte or name not in sizes) and file_digest(entry / name) != digest:
                return f"{name} is not what was written"
        if not {"tokens.bin", "offsets.npy", "hashes.npy"} <= meta["sha256"].keys():
            return f"{META} is incomplete"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{META}: {error}" if not isinstance(error, OSError) else str(error)
    return ""


def read_meta(entry: Path) -> dict:
    """Return the content of a store's meta.json.

    Raises:
        ValueError: it is not what was written.
    """
    return unsealed((entry / META).read_text(encoding="utf-8"))


def open_store(entry: Path, advice: str = "") -> TokenStore:
    """Return all documents of a store that `is_whole`; its large files are checked block by block, at first use.

    Args:
        entry: directory of the store.
        advice: what to do when a block is damaged; default: remove the store, which is a cache.

    Raises:
        UserError: it is damaged.
    """
    advice = advice or f"remove {entry}: it is made again when you start again"
    if problem := damage(entry):
        raise UserError(f"tokenized data {entry} is damaged: {problem}", advice)
    meta = read_meta(entry)
    large = {name: CheckedArray(entry / name, LARGE[name], blocks, advice) for name, blocks in meta["blocks"].items()}
    return TokenStore(
        tokens=large["tokens.bin"],
        offsets=np.load(entry / "offsets.npy"),
        hashes=np.load(entry / "hashes.npy"),
        loss=large.get("loss.bin"),
        selected=np.arange(meta["documents"]),
        fingerprint=meta.get("key", entry.name),
        max_id=meta["max_id"],
        facts=meta["facts"],
    )


def check_vocab(max_id: int, vocab_size: int) -> None:
    """Refuse token ids that are not rows of the teacher's embedding.

    Raises:
        UserError: with both numbers.
    """
    if max_id >= vocab_size:
        raise UserError(
            f"the data has token id {max_id}, but the teacher's vocabulary has {vocab_size} entries",
            "use the tokenizer that belongs to the teacher, also for data that brings its own ids",
        )
