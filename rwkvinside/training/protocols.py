"""What the training loop needs from the rest of the package: a step, its batches, and where rows come from.

Protocols only. Objectives live in `distill.steps`, batches in `data.batch`; nothing here imports them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank except `losses`.

    Args:
        loss, metrics: sums over all micro-batches and ranks, divided by the denominator; 1-d metrics as lists.
        grad_norm: global L2 norm before clipping.
        losses: this rank's loss sum per micro-batch.
    """

    loss: float
    metrics: dict[str, float | list[float]]
    grad_norm: float
    losses: list[float]

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class TrainingBatch(Protocol):
    """One micro-batch; `rows` are the global row numbers it holds, for reports."""

    rows: tuple[int, ...]

    def to(self, device: torch.device) -> TrainingBatch: ...


class RowSource(Protocol):
    """Rows by global number: any number >= 0, the same row for the same number in every run."""

    def batch(self, rows: Sequence[int]) -> TrainingBatch: ...


class Step(Protocol):
    """An objective. Sums, not means: the engine divides once by the count over all micro-batches and ranks."""

    def count(self, batch: TrainingBatch) -> int:
        """By how many items (tokens, targets) the sums of this batch count."""
        ...

    def __call__(self, model, batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one micro-batch.

        Returns:
            The loss summed over the items (0-d, must carry a gradient even where `count` is 0), and detached metric
            sums, 0-d or 1-d, with the same names and lengths for every batch on every rank. Which parameters the loss
            depends on must be the same on every rank: ZeRO 2 reduces gradients as they come and loses step otherwise.
        """
        ...
