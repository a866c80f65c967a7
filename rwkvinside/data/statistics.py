"""Statistics of tokenized data: kinds of documents, targets, lengths, padding, repetitions, unknown ids."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .batch import IGNORE
from .rows import whole_rows
from .token_store import TokenStore


@dataclass(frozen=True)
class Statistics:
    """Counts over all documents of a store."""

    store: TokenStore

    @property
    def kinds(self) -> dict[str, int]:
        """Documents by kind: text, completion, conversation, tokens, question."""
        return self._facts("kind")

    @property
    def answers(self) -> tuple[dict[str, int], dict[str, int]]:
        """How often each letter is the right answer: as given, and as trained on."""
        return self._facts("given"), self._facts("answer")

    def _facts(self, name: str) -> dict[str, int]:
        return {key.removeprefix(f"{name} "): n for key, n in self.store.facts.items() if key.startswith(f"{name} ")}

    @cached_property
    def targets(self) -> int:
        """Number of tokens to predict: those not masked and not first in a document."""
        if self.store.loss is None:
            return self.store.num_tokens - self.store.num_documents
        return sum(int((self.store.piece(i)[1] != IGNORE).sum()) for i in range(self.store.num_documents))

    @property
    def repeated(self) -> int:
        """Number of documents equal to an earlier one; rotations of a question differ."""
        hashes = self.store.hashes[self.store.selected]
        _, which, counts = np.unique(hashes, return_inverse=True, return_counts=True)
        alike = np.flatnonzero(counts[which] > 1)
        return len(alike) - len({(hashes[i], hash(self.store.piece(i)[0].tobytes())) for i in alike})

    def oversized(self, vocab_size: int) -> Counter[int]:
        """Count the ids that are not rows of an embedding of this size."""
        counts: Counter[int] = Counter()
        if self.store.max_id >= vocab_size:
            for i in range(self.store.num_documents):
                ids, _ = self.store.piece(i)
                counts.update(ids[ids >= vocab_size].tolist())
        return counts

    def histogram(self) -> list[tuple[int, int, int]]:
        """Return (shortest, longest, documents) for classes of doubling length.

        The first class is the first that is not empty.
        """
        lengths = self.store.lengths
        classes = np.floor(np.log2(lengths)).astype(int)
        counts = np.bincount(classes)
        first = int(classes.min())
        return [(2**k, 2 ** (k + 1) - 1, int(counts[k])) for k in range(first, len(counts))]

    def padding(self, seq_len: int) -> tuple[float, float]:
        """Return the shares of padding with packed rows and with rows of whole documents."""
        tokens, rows = self.store.num_tokens, -(-self.store.num_tokens // seq_len)
        uncut = int(np.minimum(self.store.lengths, seq_len).sum())
        return 1 - tokens / (rows * seq_len), 1 - uncut / (len(whole_rows(self.store.lengths, seq_len)) * seq_len)

    def cut(self, seq_len: int) -> tuple[int, int]:
        """Return how many documents and tokens rows of whole documents cut off."""
        excess = np.maximum(self.store.lengths - seq_len, 0)
        return int((excess > 0).sum()), int(excess.sum())
