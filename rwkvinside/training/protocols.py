"""What the training loop needs: a step, its batches, and rows.

Protocols only. Objectives are in `stages.steps`, batches in `data.batch`; nothing here imports them.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank except `losses`.

    Attributes:
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
        """Whether loss and gradient norm are finite."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class TrainingBatch(Protocol):
    """One micro-batch."""

    @property
    def rows(self) -> tuple[int, ...]:
        """Global numbers of its rows, for reports."""

    @property
    def num_tokens(self) -> int:
        """Number of its tokens, padding not counted."""

    def to(self, device: torch.device) -> Self:
        """Return the same batch on another device."""

    @property
    def key(self) -> Hashable:
        """All that the host knows of a `fixed` batch."""

    def fixed(self) -> Self | None:
        """Return the same batch so that the host knows little more of it than its shape; None: there is no such form.

        All that a step asks of it, without asking a device, is the same for batches of one `key`.
        """

    def twin(self) -> Self:
        """Return the same batch in memory of its own."""

    def overwrite(self, other: Self) -> None:
        """Take the contents of another batch of this `key`, in place."""


AnyBatch = TypeVar("AnyBatch", bound=TrainingBatch)
BatchRead = TypeVar("BatchRead", bound=TrainingBatch, covariant=True)
BatchTaken = TypeVar("BatchTaken", bound=TrainingBatch, contravariant=True)


class RowSource(Protocol[BatchRead]):
    """Rows by global number: the same row for the same number in every run."""

    def batch(self, rows: Sequence[int]) -> BatchRead:
        """Return the rows with these numbers, any >= 0."""


class Carried(Protocol):
    """What the rows of a step leave for those of the next."""

    def tensors(self, rows: range) -> Mapping[str, Tensor]:
        """Return what rows left at their places in the step before, (len(rows), ...) by name."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what all rows of a step left, (rows of a step, ...) by name, on the CPU."""


class Step(Protocol[BatchTaken]):
    """An objective.

    It gives sums, not means: the engine divides once by the count over all micro-batches and ranks.
    """

    def count(self, batch: BatchTaken) -> int:
        """Return by how many items (tokens, targets) the sums of a batch count."""

    def __call__(self, model: nn.Module, batch: BatchTaken) -> tuple[Tensor, dict[str, Tensor]]:
        """Return loss and metrics of one micro-batch.

        Returns:
            The loss summed over the items (0-d, must carry a gradient even where `count` is 0), and detached metric
            sums, 0-d or 1-d, with the same names and lengths for every batch on every rank. Which parameters the loss
            depends on must be the same on every rank: ZeRO 2 reduces gradients as they come and loses step otherwise.
        """
