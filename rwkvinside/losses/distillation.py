"""The distillation loss: divergence from a teacher, and cross-entropy on the text."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .chunked import ChunkedLoss, TeacherChunk, TeacherSignal
from .divergence import divergence
from .fused import Backend, Comparison
from .next_token import cross_entropy, cross_entropy_grad
from .settings import DistillLossConfig

METRIC = {"forward": "kl", "reverse": "reverse_kl", "js": "js"}


@dataclass(frozen=True)
class DistillationLoss(ChunkedLoss):
    """Divergence from a teacher and cross-entropy on the labels, weighted.

    Ids are those that both vocabularies share (the larger one is cut: families pad it differently). Metrics are "ce",
    "kl" ("reverse_kl", "js") and "agreement" (student and teacher have the same likeliest token).

    Attributes:
        signal, backend: see `ChunkedLoss`. The kernel compares all logits of both models: no top_k, no stored teacher.
        config: what is compared, and how.
    """

    signal: TeacherSignal
    config: DistillLossConfig = DistillLossConfig()
    backend: Backend = "auto"

    @property
    def chunk_tokens(self) -> int | None:
        """Positions at a time, see `ChunkedLoss`."""
        return self.config.chunk_tokens

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the sums that `block` gives after the loss."""
        return "ce", METRIC[self.config.divergence], "agreement"

    def comparison(self, chunk: TeacherChunk | None) -> Comparison | None:
        """Return how the kernel computes this loss, see `ChunkedLoss`."""
        assert chunk is not None, "this loss has a signal"
        c = self.config
        if c.top_k is not None or chunk.logits is None:
            return None
        return Comparison(chunk.logits, c.divergence, c.kl, c.ce, c.temperature)

    def block(
        self, logits: Tensor, labels: Tensor, chunk: TeacherChunk | None, positions: slice, need_grad: bool
    ) -> tuple[list[Tensor], Tensor | None]:
        """Return sums over some positions and the logits' gradient, see `ChunkedLoss`."""
        assert chunk is not None, "this loss has a signal"
        c = self.config
        target = chunk.distribution(positions, logits.shape[1], c.temperature)
        logits = logits[:, : target.vocab]
        agreement = (logits.argmax(-1) == target.best).sum()
        plain = F.log_softmax(logits, -1)
        log_q = plain if c.temperature == 1 else F.log_softmax(logits / c.temperature, -1)
        entropy = cross_entropy(plain, labels)
        labels_grad = cross_entropy_grad(plain.exp(), labels, c.ce) if need_grad and c.ce else None
        value, grad = divergence(c.divergence, target.top(c.top_k), log_q, need_grad)
        value = value * c.temperature**2
        if grad is not None:
            grad.mul_(c.kl * c.temperature)  # of the square, one went into the logits
            if labels_grad is not None:
                grad.add_(labels_grad)
        return [c.kl * value + c.ce * entropy, entropy, value, agreement], grad
