"""One step per objective: a packed batch in, a loss sum and metric sums out. The trainer divides by the global
count."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.batch import Batch
from .losses import alignment_loss, head_losses
from .teacher import Teacher


@dataclass
class AlignStep:
    """Each mixer imitates its layer's attention on the teacher's own hidden states (RADLADS step 1).

    Args:
        power: {layer: mean squared norm per token of the teacher's attention output}, from `calibrate.teacher_power`.
        checkpoint: recompute mixers in the backward.
    """

    power: dict[int, float]
    checkpoint: bool = False

    def count(self, batch: Batch) -> int:
        return batch.num_tokens

    def __call__(self, model, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, layers = alignment_loss(model(batch, mode="align", checkpoint=self.checkpoint), self.power)
        return loss, {"layers": layers}


@dataclass
class DistilStep:
    """The student's next-token distribution follows the teacher's; cross-entropy on the text may be added.

    Args:
        teacher: where the targets come from.
        kl, ce, temperature, chunk_tokens: see `head_losses`.
    """

    teacher: Teacher
    kl: float = 1.0
    ce: float = 0.0
    temperature: float = 1.0
    chunk_tokens: int = 1024

    def count(self, batch: Batch) -> int:
        return batch.num_targets

    def __call__(self, model, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        teacher_hidden, teacher_head = self.teacher(model, batch)

        def readout(hidden: Tensor, head: torch.nn.Module):
            return head_losses(
                hidden,
                head,
                batch.labels,
                teacher_hidden,
                teacher_head,
                kl=self.kl,
                ce=self.ce,
                temperature=self.temperature,
                chunk_tokens=self.chunk_tokens,
            )

        return model(batch, mode="student", readout=readout)


@dataclass
class SftStep:
    """Cross-entropy on the labelled positions (completions), no teacher."""

    chunk_tokens: int = 1024

    def count(self, batch: Batch) -> int:
        return batch.num_targets

    def __call__(self, model, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        def readout(hidden: Tensor, head: torch.nn.Module):
            return head_losses(hidden, head, batch.labels, None, None, kl=0.0, ce=1.0, chunk_tokens=self.chunk_tokens)

        return model(batch, mode="student", readout=readout)
