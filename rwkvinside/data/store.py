"""Token ids on disk, memory-mapped, and the selection of documents that is shown. Knows no tokenizer, rows or order.

A store is a directory with tokens.bin (uint32, all documents one after another), offsets.npy (int64, documents + 1),
hashes.npy (uint64 of each document's content), loss.bin (uint8 per token, only with conversations) and meta.json.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..errors import UserError
from .batch import IGNORE

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenStore:
    """Tokenised documents, or a selection of them.

    Args:
        tokens: uint32, all tokens on disk.
        offsets: (documents on disk + 1,) int64, where each document begins in `tokens`.
        hashes: (documents on disk,) uint64 of each document's content.
        loss: uint8 like `tokens`, 1 = may be a target; None = all may.
        selected: int64 indices of the documents that this store shows.
        fingerprint: changes when any token or the selection changes (for the data cursor of a checkpoint).
        max_id: the largest token id on disk.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    hashes: np.ndarray
    loss: np.ndarray | None
    selected: np.ndarray
    fingerprint: str
    max_id: int

    @property
    def num_documents(self) -> int:
        return len(self.selected)

    @property
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
        first, end = (int(x) for x in self.offsets[self.selected[document] :][:2])
        a, b = first + start, end if stop is None else min(first + stop, end)
        ids = self.tokens[a:b].astype(np.int64)
        labels = np.full(b - a, IGNORE, dtype=np.int64)
        following = self.tokens[a + 1 : min(b + 1, end)]
        labels[: len(following)] = following
        if self.loss is not None:
            labels[: len(following)][self.loss[a + 1 : min(b + 1, end)] == 0] = IGNORE
        return ids, labels

    def select(self, documents: np.ndarray) -> TokenStore:
        """Only these documents (indices into this store), in this order."""
        selected = self.selected[documents]
        digest = hashlib.sha256(self.fingerprint.encode() + selected.tobytes()).hexdigest()[:32]
        return replace(self, selected=selected, fingerprint=digest)

    def split(self, fraction: float) -> tuple[TokenStore, TokenStore | None]:
        """(training, validation): a document goes by a hash of its content.

        So it stays on its side when others are added, and equal documents are on the same side.

        Raises:
            UserError: one of the sides would be empty.
        """
        if fraction == 0:
            return self, None
        val = self.hashes[self.selected] / 2.0**64 < fraction
        if not val.any() or val.all():
            raise UserError(
                f"a validation split of {fraction:g} takes {val.sum()} of {self.num_documents} documents",
                "give a validation source (--val), change data.val_fraction, or set it to 0",
            )
        return self.select(np.flatnonzero(~val)), self.select(np.flatnonzero(val))

    def check_vocab(self, vocab_size: int) -> None:
        """Raises UserError unless every token id is a row of the teacher's embedding."""
        check_vocab(self.max_id, vocab_size)


def is_whole(entry: Path) -> bool:
    """Whether a store is there with all its bytes. A damaged one counts as missing, and the log says so."""
    if not entry.exists():
        return False
    try:
        meta = json.loads((entry / "meta.json").read_text(encoding="utf-8"))
        expected = {
            "tokens.bin": 4 * meta["tokens"],
            "offsets.npy": 128 + 8 * (meta["documents"] + 1),
            "hashes.npy": 128 + 8 * meta["documents"],
        }
        if meta["conversations"]:
            expected["loss.bin"] = meta["tokens"]
        damaged = [name for name, size in expected.items() if (entry / name).stat().st_size != size]
    except (OSError, ValueError, KeyError) as error:
        damaged = [str(error)]
    if damaged:
        log.warning("token cache %s is damaged (%s) and is made again", entry, ", ".join(damaged))
    return not damaged


def open_store(entry: Path) -> TokenStore:
    """All documents of a store that `is_whole`."""
    meta = json.loads((entry / "meta.json").read_text(encoding="utf-8"))
    return TokenStore(
        tokens=np.memmap(entry / "tokens.bin", dtype=np.uint32, mode="r"),
        offsets=np.load(entry / "offsets.npy"),
        hashes=np.load(entry / "hashes.npy"),
        loss=np.memmap(entry / "loss.bin", dtype=np.uint8, mode="r") if meta["conversations"] else None,
        selected=np.arange(meta["documents"]),
        fingerprint=entry.name,
        max_id=meta["max_id"],
    )


def check_vocab(max_id: int, vocab_size: int) -> None:
    """Raises UserError, with both numbers, if a token id is no row of the teacher's embedding."""
    if max_id >= vocab_size:
        raise UserError(
            f"the tokenizer gives id {max_id}, but the teacher's vocabulary has {vocab_size} entries",
            "use the tokenizer that belongs to the teacher",
        )
