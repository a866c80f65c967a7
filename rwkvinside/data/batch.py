"""A packed batch: token rows, the documents inside them, and the targets."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, each with one or more documents.

    Attributes:
        input_ids: (B, T) int64.
        labels: (B, T) int64, already shifted: labels[t] is the target predicted at t; -100 = no loss.
        position_ids: (B, T) int64, restarting at 0 in each document.
        segment_ids: (B, T) int32, 0 = padding, 1, 2, ... = documents of the row.
        rows: global row numbers, for reports.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    rows: tuple[int, ...]

    def to(self, device) -> Batch:
        """Return the same batch on another device."""
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "rows"})

    def twice(self) -> Batch:
        """Return all rows, followed by the same rows again."""
        doubled = {f.name: torch.cat(2 * [getattr(self, f.name)]) for f in fields(self) if f.name != "rows"}
        return replace(self, **doubled, rows=2 * self.rows)

    @property
    def mask(self) -> Tensor:
        """Real tokens as (B, T) bool, False = padding."""
        return self.segment_ids > 0

    @property
    def num_tokens(self) -> int:
        """Number of real tokens."""
        return int(self.mask.sum())

    @property
    def num_targets(self) -> int:
        """Number of tokens to predict."""
        return int((self.labels != IGNORE).sum())

    @property
    def cu_seqlens(self) -> Tensor:
        """Bounds of the documents in the flattened B * T tokens, (S + 1,) int32.

        The padding of a row is a sequence too, and the end of a row always ends one.
        """
        starts = torch.ones_like(self.segment_ids, dtype=torch.bool)
        starts[:, 1:] = self.segment_ids[:, 1:] != self.segment_ids[:, :-1]
        end = torch.tensor([starts.numel()], device=starts.device)
        return torch.cat([starts.flatten().nonzero().flatten(), end]).int()


def attention_mask_4d(batch: Batch) -> Tensor:
    """Return (B, 1, T, T) bool, True = may attend: causally within the same document.

    A padding query attends only to itself.
    """
    T = batch.input_ids.shape[1]
    same = batch.segment_ids[:, :, None] == batch.segment_ids[:, None, :]
    causal = torch.ones(T, T, dtype=torch.bool, device=same.device).tril()
    allowed = same & causal & batch.mask[:, :, None]
    return (allowed | torch.eye(T, dtype=torch.bool, device=same.device))[:, None]
