"""Token ids on disk, memory-mapped, and the selection of documents that is shown. Knows no tokenizer, rows or order.

A store is a directory with tokens.bin (uint32, all documents one after another), offsets.npy (int64, documents + 1),
hashes.npy (uint64 of each document's content), loss.bin (uint8 per token, only where some carry no loss) and meta.json,
which is written last and has the files' SHA-256.
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

import numpy as np

from ..errors import UserError
from ..support.files import file_digest, publish, temporary_sibling
from .batch import IGNORE

FORMAT = 2
META = "meta.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoded:
    """A tokenized document.

    Args:
        digest: 64 bits of a hash of its content.
        ids: uint32.
        loss: bool like ids, True = may be a target; None: all may.
        facts: things to count over all documents, such as its kind.
    """

    digest: int
    ids: np.ndarray
    loss: np.ndarray | None = None
    facts: tuple[str, ...] = ()


class Joined:
    """Arrays that are sliced as if they stood one after another; nothing is copied before."""

    def __init__(self, parts: Sequence[np.ndarray]):
        self.parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, wanted: slice) -> np.ndarray:
        start, stop, _ = wanted.indices(len(self))
        first = int(np.searchsorted(self._ends, start, side="right"))
        found = []
        for part, end in zip(self.parts[first:], self._ends[first:], strict=True):
            begin = int(end) - len(part)
            found.append(part[max(start - begin, 0) : max(stop - begin, 0)])
            if stop <= end:
                break
        return np.concatenate(found) if len(found) != 1 else found[0]


@dataclass(frozen=True)
class TokenStore:
    """Tokenized documents, or a selection of them.

    Args:
        tokens: integers, all tokens on disk.
        offsets: (documents on disk + 1,) int64, where each document begins in `tokens`.
        hashes: (documents on disk,) uint64 of each document's content.
        loss: uint8 like `tokens`, 1 = may be a target; None = all may.
        selected: int64 indices of the documents that this store shows.
        fingerprint: changes when any token or the selection changes (for the data cursor of a checkpoint).
        max_id: the largest token id on disk.
        facts: counts over the documents on disk, see `Encoded`.
    """

    tokens: np.ndarray | Joined
    offsets: np.ndarray
    hashes: np.ndarray
    loss: np.ndarray | Joined | None
    selected: np.ndarray
    fingerprint: str
    max_id: int
    facts: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_documents(self) -> int:
        return len(self.selected)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(num_documents,) int64 tokens of each document."""
        return self.offsets[self.selected + 1] - self.offsets[self.selected]

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def piece(self, document: int, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [start, stop) of a document and their targets, both int64.

        The target is the document's next token, also where it lies behind `stop`; -100 at the document's last token
        and in front of tokens that carry no loss.
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

    def masked(self, document: int) -> np.ndarray:
        """Bool over a document's tokens, True = carries no loss."""
        first, end = self._bounds(document)
        return np.zeros(end - first, dtype=bool) if self.loss is None else self.loss[first:end] == 0

    def _bounds(self, document: int) -> tuple[int, int]:
        at = self.selected[document]
        return int(self.offsets[at]), int(self.offsets[at + 1])

    def select(self, documents: np.ndarray) -> TokenStore:
        """Only these documents (indices into this store), in this order."""
        selected = self.selected[documents]
        digest = hashlib.sha256(self.fingerprint.encode() + selected.tobytes()).hexdigest()[:32]
        return replace(self, selected=selected, fingerprint=digest)

    def first(self, tokens: int, *, reach: bool = False) -> TokenStore:
        """The first documents that hold at most this many tokens together, at least one.

        Args:
            reach: with the document in which the number is reached.
        """
        side = "left" if reach else "right"
        count = max(1, int(np.searchsorted(np.cumsum(self.lengths), tokens, side=side)) + reach)
        return self if count >= self.num_documents else self.select(np.arange(count))

    def without_masks(self) -> TokenStore:
        """Every token may be a target."""
        return self if self.loss is None else replace(self, loss=None, fingerprint=f"{self.fingerprint}-all")

    def held_out(self, fraction: float) -> np.ndarray:
        """Bool over the documents, True = for validation, by a hash of the content.

        So a document stays on its side when others are added, and equal documents are on the same side.
        """
        return self.hashes[self.selected] / 2.0**64 < fraction

    def split(self, fraction: float) -> tuple[TokenStore, TokenStore | None]:
        """(training, validation), see `held_out`.

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
        """Raises UserError unless every token id is a row of the teacher's embedding."""
        check_vocab(self.max_id, vocab_size)


def join(stores: Sequence[TokenStore]) -> TokenStore:
    """The documents of several stores one after another."""
    if len(stores) == 1:
        return stores[0]
    loss = None
    if any(store.loss is not None for store in stores):
        every = np.ones(1, dtype=np.uint8)  # stands for a mask that lets all through
        loss = Joined([np.broadcast_to(every, len(s.tokens)) if s.loss is None else s.loss for s in stores])
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
    """Writes a store, document by document, into a directory that it makes; without `finish` it is no store.

    Attributes:
        documents, tokens, max_id: of what was added so far.
    """

    def __init__(self, directory: Path):
        directory.mkdir()
        self.directory = directory
        self.max_id = 0
        self._offsets, self._hashes = array("q", [0]), array("Q")
        self._files = {name: (directory / name).open("wb") for name in ("tokens.bin", "loss.bin")}
        self._digests = {name: hashlib.sha256() for name in self._files}
        self._masked = False
        self._facts: Counter[str] = Counter()

    @property
    def documents(self) -> int:
        return len(self._hashes)

    @property
    def tokens(self) -> int:
        return self._offsets[-1]

    def add(self, document: Encoded) -> None:
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
            meta: JSON values to keep in meta.json; what is counted here stands beside them.
        """
        self._close()
        if not self._masked:
            (self.directory / "loss.bin").unlink()
            del self._digests["loss.bin"]
        np.save(self.directory / "offsets.npy", np.frombuffer(self._offsets, dtype=np.int64))
        np.save(self.directory / "hashes.npy", np.frombuffer(self._hashes, dtype=np.uint64))
        small = {name: file_digest(self.directory / name) for name in ("offsets.npy", "hashes.npy")}
        counts = {
            "documents": self.documents,
            "tokens": self.tokens,
            "max_id": self.max_id,
            "facts": dict(sorted(self._facts.items())),
            "sha256": {name: digest.hexdigest() for name, digest in self._digests.items()} | small,
        }
        text = json.dumps({"format": FORMAT} | counts | dict(meta), indent=1) + "\n"
        (self.directory / META).write_text(text, encoding="utf-8")

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


def entry_key(identity: Mapping) -> str:
    """The name of a cache entry, from what it depends on."""
    return hashlib.sha256(json.dumps([FORMAT, identity], sort_keys=True).encode()).hexdigest()[:32]


def stats_of(files: Iterable[Path]) -> list:
    """JSON values that change when one of the files does, without reading them."""
    stats = [(file, file.stat()) for file in files]
    return [[str(file.resolve()), stat.st_size, stat.st_mtime_ns] for file, stat in stats]


@contextmanager
def writing(target: Path) -> Iterator[Path]:
    """A temporary path next to `target`; the file or store that is made there takes its place if all went well.

    Several processes may write the same. A store that was not finished is dropped.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with temporary_sibling(target, unique=True) as unfinished:
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
    """Rename a store into place; when another process was faster, its result is the same."""
    if entry.exists() and not is_whole(entry):
        shutil.rmtree(entry)
    try:
        publish(unfinished, entry)
    except OSError:
        if not is_whole(entry):
            raise


def is_whole(entry: Path) -> bool:
    """Whether a store is there with all its bytes. A damaged one counts as missing, and the log says so."""
    if not entry.exists():
        return False
    if found := damage(entry):
        log.warning("token cache %s is damaged (%s) and is made again", entry, found)
    return not found


def damage(entry: Path, *, every_byte: bool = False) -> str:
    """What is wrong with the files of a store, "" if nothing.

    Args:
        every_byte: read all tokens too; else their files' sizes must do.
    """
    try:
        meta = read_meta(entry)
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
    """meta.json of a store."""
    return json.loads((entry / META).read_text(encoding="utf-8"))


def open_store(entry: Path) -> TokenStore:
    """All documents of a store that `is_whole`."""
    meta = read_meta(entry)
    masked = "loss.bin" in meta["sha256"]
    return TokenStore(
        tokens=np.memmap(entry / "tokens.bin", dtype=np.uint32, mode="r"),
        offsets=np.load(entry / "offsets.npy"),
        hashes=np.load(entry / "hashes.npy"),
        loss=np.memmap(entry / "loss.bin", dtype=np.uint8, mode="r") if masked else None,
        selected=np.arange(meta["documents"]),
        fingerprint=meta.get("key", entry.name),
        max_id=meta["max_id"],
        facts=meta["facts"],
    )


def check_vocab(max_id: int, vocab_size: int) -> None:
    """Raises UserError, with both numbers, if a token id is no row of the teacher's embedding."""
    if max_id >= vocab_size:
        raise UserError(
            f"the data has token id {max_id}, but the teacher's vocabulary has {vocab_size} entries",
            "use the tokenizer that belongs to the teacher, also for data that brings its own ids",
        )
