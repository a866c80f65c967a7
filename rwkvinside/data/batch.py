"""A packed batch: token rows, the documents inside them, and the targets."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
FIXED_PARTS = 8  # of the tokens of a batch: its fixed form has a whole number of them as targets


@dataclass(frozen=True)
class Documents:
    """Where the documents of a batch lie in its flattened B * T tokens.

    The padding of a row is a document here, and the end of a row always ends one. All but `cu_seqlens` are numbers that
    the host knows: whatever depends on them is decided without asking a device.

    Attributes:
        lengths: tokens of each, in order.
        longest: tokens of the longest.
        alone: each row starts with its only document, so that only padding follows. Plain causal attention, and a
            recurrence that starts anew in every row, keep such documents apart by themselves.
        padded: there is padding.
        cu_seqlens: bounds, (S + 1,) int32.

    What a `fixed` batch has is true of every batch of its key: `lengths` are then None unless documents are alone,
    `longest` is the length of a row, and bounds end with empty documents.
    """

    lengths: tuple[int, ...] | None
    longest: int
    alone: bool
    padded: bool
    cu_seqlens: Tensor

    @classmethod
    def of(cls, segment_ids: Tensor) -> Documents:
        """Return the documents of rows, from the `segment_ids` of a `Batch`."""
        starts = torch.ones_like(segment_ids, dtype=torch.bool)
        starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
        end = torch.tensor([starts.numel()], device=starts.device)
        cu_seqlens = torch.cat([starts.flatten().nonzero().flatten(), end])
        lengths = tuple(cu_seqlens.diff().tolist())
        real = segment_ids > 0
        return cls(
            lengths=lengths,
            longest=max(lengths, default=0),
            alone=not bool((starts & real)[:, 1:].any()),
            padded=not bool(real.all()),
            cu_seqlens=cu_seqlens.int(),
        )

    def fixed(self, row: int) -> Documents:
        """Return the documents of rows of so many tokens as a `fixed` batch has them: a power of two of them."""
        if self.alone:
            return self
        count = len(self.cu_seqlens) - 1
        more = (1 << (count - 1).bit_length()) - count
        cu_seqlens = torch.cat([self.cu_seqlens, self.cu_seqlens[-1:].expand(more)])
        return replace(self, lengths=None, longest=row, cu_seqlens=cu_seqlens)

    def to(self, device) -> Documents:
        """Return the same documents with their bounds on another device."""
        return replace(self, cu_seqlens=self.cu_seqlens.to(device))


class Targets(NamedTuple):
    """The positions of a batch that have a label, in row-major order.

    How many they are is known without asking a device, which a boolean index would wait for.

    Attributes:
        positions: (N,) int64 in the flattened B * T tokens.
        labels: (N,) int64.
        real: (N,) bool, False where a position only fills up a fixed number, see `Batch.fixed`; None: all are.
    """

    positions: Tensor
    labels: Tensor
    real: Tensor | None = None

    @classmethod
    def of(cls, labels: Tensor) -> Targets:
        """Return the targets of `Batch.labels`."""
        labels = labels.flatten()
        positions = (labels != IGNORE).nonzero().flatten()
        return cls(positions, labels[positions])

    def take(self, x: Tensor) -> Tensor:
        """Return the rows (N, D) of x (B, T, D) at the positions."""
        return x.flatten(0, 1).index_select(0, self.positions)

    def fixed(self, count: int) -> Targets:
        """Return so many targets, the last of which are not real."""
        more = count - len(self.positions)
        positions, labels = (F.pad(x, (0, more)) for x in (self.positions, self.labels))
        return Targets(positions, labels, torch.arange(count, device=labels.device) < len(self.positions))

    def part(self, which: slice) -> Targets:
        """Return some of them."""
        return Targets(*(x if x is None else x[which] for x in self))

    def to(self, device) -> Targets:
        """Return the same targets on another device."""
        return Targets(*(x if x is None else x.to(device) for x in self))


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, each with one or more documents.

    What is counted is counted when a batch is made, which should be on the CPU, and travels along: the tensors are not
    written to afterwards, `dataclasses.replace` counts anew.

    Attributes:
        input_ids: (B, T) int64.
        labels: (B, T) int64, already shifted: labels[t] is the target predicted at t; -100 = no loss.
        position_ids: (B, T) int64, restarting at 0 in each document; a row that goes on with a document from where
            another row has left it begins with a larger one.
        segment_ids: (B, T) int32, 0 = padding, 1, 2, ... = documents of the row.
        rows: global row numbers, for reports.
        documents: where the documents lie.
        targets: the positions with a label.
        goes_on: (B,) bool on the CPU, which rows go on with a document.
        num_tokens: number of real tokens.
        num_targets: number of tokens to predict.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    rows: tuple[int, ...]
    documents: Documents = field(init=False, repr=False)
    targets: Targets = field(init=False, repr=False)
    goes_on: Tensor = field(init=False, repr=False)
    num_tokens: int = field(init=False, repr=False)
    num_targets: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        targets = Targets.of(self.labels)
        vars(self).update(
            documents=Documents.of(self.segment_ids),
            targets=targets,
            goes_on=(self.position_ids[:, 0] > 0).cpu(),
            num_tokens=int(self.mask.sum()),
            num_targets=len(targets.positions),
        )

    def to(self, device) -> Batch:
        """Return the same batch on another device."""
        tensors = {name: tensor.to(device) for name, tensor in self._tensors().items()}
        return self._with(**tensors, documents=self.documents.to(device), targets=self.targets.to(device))

    @property
    def key(self) -> tuple[tuple[int, ...], int, int]:
        """Shape, number of bounds of documents (0: each is alone in its row), number of targets."""
        bounds = 0 if self.documents.alone else len(self.documents.cu_seqlens)
        return tuple(self.input_ids.shape), bounds, len(self.targets.positions)

    def fixed(self) -> Batch | None:
        """Return the same batch so that all that the host knows follows from its `key`, for a CUDA graph.

        Documents are filled up to a power of two by empty ones, targets to eighths of the tokens by such that are not
        real. `num_tokens` and `num_targets` stay those of this batch. None: there is padding.
        """
        if self.documents.padded:
            return None
        rows, length = self.input_ids.shape
        part = -(-rows * length // FIXED_PARTS)
        targets = self.targets.fixed(max(1, -(-len(self.targets.positions) // part)) * part)
        return self._with(documents=self.documents.fixed(length), targets=targets)

    def twin(self) -> Batch:
        """Return the same batch in memory of its own."""
        documents = replace(self.documents, cu_seqlens=self.documents.cu_seqlens.clone())
        targets = Targets(*(x if x is None else x.clone() for x in self.targets))
        return self._with(**{n: x.clone() for n, x in self._tensors().items()}, documents=documents, targets=targets)

    def overwrite(self, other: Batch) -> None:
        """Take the tensors of another batch of this `key`, in place; what the host counts stays."""
        mine, theirs = ([*b._tensors().values(), b.documents.cu_seqlens, *b.targets] for b in (self, other))
        for x, y in zip(mine, theirs, strict=True):
            if x is not None and y is not None:
                x.copy_(y)

    def _with(self, **changes: object) -> Batch:
        """Return a copy with other contents, which is not counted anew."""
        changed = copy(self)
        vars(changed).update(changes)
        return changed

    def twice(self) -> Batch:
        """Return all rows, followed by the same rows again."""
        return Batch(**{name: torch.cat([x, x]) for name, x in self._tensors().items()}, rows=2 * self.rows)

    def joined(self) -> Batch:
        """Return the rows as one document each; labels stay what they are."""
        return replace(
            self,
            position_ids=torch.arange(self.input_ids.shape[1], device=self.input_ids.device).expand_as(self.input_ids),
            segment_ids=(self.segment_ids > 0).to(self.segment_ids.dtype),
        )

    @property
    def mask(self) -> Tensor:
        """Real tokens as (B, T) bool, False = padding."""
        return self.segment_ids > 0

    def _tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init and f.name != "rows"}
