"""Cross-entropy on the labels: all of the loss of sft, and a part of distillation."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .chunked import ChunkedLoss, TeacherChunk
from .fused import Backend, Comparison


@dataclass(frozen=True)
class NextTokenLoss(ChunkedLoss):
    """Cross-entropy on the labels, no teacher; its metric is "ce".

    Attributes:
        chunk_tokens, backend: see `ChunkedLoss`.
    """

    chunk_tokens: int | None = None
    backend: Backend = "auto"
    signal = None
    metrics = ("ce",)

    def comparison(self, chunk: TeacherChunk | None) -> Comparison:
        """Return how the kernel computes this loss, see `ChunkedLoss`."""
        return Comparison()

    def block(
        self, logits: Tensor, labels: Tensor, chunk: TeacherChunk | None, positions: slice, need_grad: bool
    ) -> tuple[list[Tensor], Tensor | None]:
        """Return sums over some positions and the logits' gradient, see `ChunkedLoss`."""
        log_q = F.log_softmax(logits, -1)
        entropy = cross_entropy(log_q, labels)
        return [entropy, entropy], cross_entropy_grad(log_q.exp_(), labels) if need_grad else None


def cross_entropy(log_q: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy summed over positions (0-d, nats).

    Args:
        log_q: (n, V) log-probabilities.
        labels: (n,) int64 below V.
    """
    return F.nll_loss(log_q, labels, reduction="sum")


def cross_entropy_grad(q: Tensor, labels: Tensor, weight: float = 1.0) -> Tensor:
    """Return the logits' gradient of `weight` times `cross_entropy`.

    Args:
        q: (n, V) softmax of the logits; overwritten.
        labels: (n,) int64 below V.
        weight: of the cross-entropy.
    """
    at_labels = labels[:, None]
    return q.scatter_(-1, at_labels, q.gather(-1, at_labels) - 1).mul_(weight)
