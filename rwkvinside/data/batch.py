"""A packed batch: token rows, the documents inside them, and the targets."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

IGNORE = -100


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
    """

    lengths: tuple[int, ...]
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

    def to(self, device) -> Documents:
        """Return the same documents with their bounds on another device."""
        return replace(self, cu_seqlens=self.cu_seqlens.to(device))


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
    goes_on: Tensor = field(init=False, repr=False)
    num_tokens: int = field(init=False, repr=False)
    num_targets: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        vars(self).update(
            documents=Documents.of(self.segment_ids),
            goes_on=(self.position_ids[:, 0] > 0).cpu(),
            num_tokens=int(self.mask.sum()),
            num_targets=int((self.labels != IGNORE).sum()),
        )

    def to(self, device) -> Batch:
        """Return the same batch on another device."""
        moved = copy(self)  # not made anew, which would count on that device
        vars(moved).update({name: tensor.to(device) for name, tensor in self._tensors().items()})
        vars(moved).update(documents=self.documents.to(device))
        return moved

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
