"""Vectors in documents, windows that never cross them, splits by document, rows and batches of training."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from . import tmd as tmd_codes
from .settings import DataConfig


@dataclass(frozen=True)
class VectorData:
    """Vectors of documents, in their order.

    Attributes:
        vectors: (N, d) fp32.
        documents: (N,) ascending number of each vector's document.
        texts: of the vectors; None where there are none.
        codes: (N,) TMD codes; None where there are none.
        card: what the vectors are: `space`, `dim`, and where they came from.
    """

    vectors: Tensor
    documents: Tensor
    texts: list[str] | None
    codes: Tensor | None
    card: dict

    @cached_property
    def digest(self) -> str:
        """SHA-256 of vectors, documents and codes."""
        sha = hashlib.sha256()
        for part in (self.vectors, self.documents, self.codes):
            if part is not None:
                sha.update(part.numpy().tobytes())
        return sha.hexdigest()

    def reversed(self) -> VectorData:
        """Return the same documents read backward."""
        count = torch.bincount(self.documents)
        start = count.cumsum(0) - count
        place = torch.arange(len(self.documents)) - start[self.documents]
        order = start[self.documents] + count[self.documents] - 1 - place
        texts = self.texts and [self.texts[i] for i in order.tolist()]
        codes = None if self.codes is None else self.codes[order]
        return replace(self, vectors=self.vectors[order], texts=texts, codes=codes)


@dataclass(frozen=True)
class VectorBatch:
    """Windows of a step.

    Attributes:
        rows: their global numbers.
        x: (B, T, d), y: (B, T, d) the vector after each one.
        tmd: (B, 16), None without codes.
    """

    rows: tuple[int, ...]
    x: Tensor
    y: Tensor
    tmd: Tensor | None

    @property
    def num_tokens(self) -> int:
        """Number of context vectors."""
        return self.x.shape[0] * self.x.shape[1]

    def to(self, device: torch.device) -> Self:
        """Return the same batch on another device."""
        tmd = None if self.tmd is None else self.tmd.to(device)
        return replace(self, x=self.x.to(device), y=self.y.to(device), tmd=tmd)


@dataclass(frozen=True)
class Windows:
    """Windows of `context` vectors and the next one, by their first vector.

    Attributes:
        data: they are of.
        starts: (M,) positions in `data.vectors`.
        context: vectors of a window before the target.
    """

    data: VectorData
    starts: Tensor
    context: int

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def targets(self) -> Tensor:
        """Positions (M,) of the targets."""
        return self.starts + self.context

    def batch(self, index: Tensor, rows: Sequence[int] = ()) -> VectorBatch:
        """Return windows by their place among these."""
        at = self.starts[index][:, None] + torch.arange(self.context + 1)
        vectors = self.data.vectors[at]
        codes = self.data.codes
        tmd = None if codes is None else tmd_codes.vectors(codes[self.targets[index]])
        return VectorBatch(tuple(rows) or tuple(index.tolist()), vectors[:, :-1], vectors[:, 1:], tmd)

    def select(self, mask: Tensor) -> Windows:
        """Return the windows where a mask (M,) is True."""
        return replace(self, starts=self.starts[mask])

    def evenly(self, most: int) -> Windows:
        """Return at most so many windows, evenly spaced."""
        return replace(self, starts=self.starts[evenly(len(self), most)])

    def first(self, limit: int | None) -> Windows:
        """Return at most so many windows, the first ones of whole documents."""
        return self if limit is None else replace(self, starts=self.starts[:limit])

    def nearness(self) -> Tensor:
        """Return the cosine (M,) of the last context vector with the target."""
        vectors = self.data.vectors
        return F.cosine_similarity(vectors[self.targets - 1], vectors[self.targets], dim=-1)


@dataclass(frozen=True)
class Split:
    """Training and validation windows, of different documents."""

    train: Windows
    val: Windows


class EpochOrder:
    """The place of every global row number: each epoch in an order of its own, a function of seed and number alone.

    Args:
        count: places.
        seed: of the orders.
    """

    def __init__(self, count: int, seed: int):
        self._count, self._seed = count, seed
        self._epoch, self._order = -1, torch.empty(0)

    def __getitem__(self, row: int) -> int:
        epoch, at = divmod(row, self._count)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(hash((self._seed, epoch)) % 2**63)
            self._epoch, self._order = epoch, torch.randperm(self._count, generator=generator)
        return int(self._order[at])


class WindowRows:
    """Windows by global row number, see `EpochOrder`."""

    def __init__(self, windows: Windows, seed: int):
        self._windows, self._order = windows, EpochOrder(len(windows), seed)

    def batch(self, rows: Sequence[int]) -> VectorBatch:
        """Return the windows with these numbers, any >= 0."""
        return self._windows.batch(torch.tensor([self._order[row] for row in rows]), rows)


def load_data(settings: DataConfig) -> VectorData:
    """Return the data of a configuration.

    Raises:
        UserError: there is none, or it is not what was written.
    """
    kind, colon, name = settings.source.partition(":")
    if colon and kind == "synthetic":
        from .synthetic import synthetic

        data = synthetic(name)
    else:
        from .store import read_store

        data = read_store(settings.source)
    return data.reversed() if settings.reverse else data


def split(data: VectorData, settings: DataConfig) -> Split:
    """Return training and validation windows, of different documents, see `validating`.

    Raises:
        UserError: no document is long enough, or one of both has no window.
    """
    documents, context = data.documents, settings.context
    starts = torch.arange(len(documents) - context) if len(documents) > context else torch.empty(0, dtype=torch.long)
    starts = starts[documents[starts] == documents[starts + context]]
    validates = validating(data, settings.val)
    val = validates[documents[starts]]
    both = Split(Windows(data, starts[~val], context), Windows(data, starts[val], context))
    if not len(both.train) or not len(both.val):
        raise UserError(
            f"{len(both.train)} windows of {context} + 1 vectors to train on and {len(both.val)} to validate, "
            f"in {len(validates)} documents of data.source={settings.source}",
            "use more or longer documents, or a smaller data.context",
        )
    return replace(both, train=both.train.first(settings.limit))


def validating(data: VectorData, part: float) -> Tensor:
    """Return for every document (D,) whether it validates: the part of them whose numbers have the lowest hashes."""
    count = int(data.documents[-1]) + 1 if len(data.documents) else 0
    order = sorted(range(count), key=_hash)
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[order[: max(1, round(part * count))]] = True
    return chosen


def evenly(count: int, most: int) -> Tensor:
    """Return at most `most` of `count` places, evenly spaced."""
    return torch.linspace(0, count - 1, min(count, most)).round().long()


def shuffled_codes(data: VectorData) -> VectorData:
    """Return the data with the codes of other documents, to see whether a model listens to them.

    Raises:
        UserError: it has no codes.
    """
    if data.codes is None:
        raise UserError(f"vectors of {data.card.get('space')} have no TMD codes to shuffle", "use data with codes")
    count = int(data.documents[-1]) + 1
    of_document = torch.zeros(count, dtype=data.codes.dtype).scatter_(0, data.documents, data.codes)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return replace(data, codes=of_document[order][data.documents])


def _hash(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()
