"""One step per objective: a packed batch in, a loss sum and metric sums out. The trainer divides by the global
count."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..data.batch import Batch
from ..losses.alignment import alignment_loss
from ..losses.distillation import Objective, Targets, head_losses
from ..teacher.signals import Teacher


@dataclass
class AlignStep:
    """Each mixer imitates its layer's attention on the teacher's own hidden states (RADLADS step 1).

    Args:
        power: {layer: mean squared norm per token of the teacher's attention output}, from `calibrate.teacher_norms`.
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
class DistillStep:
    """The student's next-token distribution follows the teacher's; cross-entropy on the text may be added.

    Args:
        teacher: where the targets come from.
        objective: what is compared, and how.
    """

    teacher: Teacher
    objective: Objective = Objective()

    def count(self, batch: Batch) -> int:
        return batch.num_targets

    def __call__(self, model, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return _judged(model, batch, self.teacher.targets(model, batch), self.objective)


@dataclass
class SftStep:
    """Cross-entropy on the labeled positions (completions), no teacher."""

    objective: Objective = Objective(kl=0.0, ce=1.0)

    def count(self, batch: Batch) -> int:
        return batch.num_targets

    def __call__(self, model, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return _judged(model, batch, None, self.objective)


def _judged(model, batch: Batch, targets: Targets | None, objective: Objective) -> tuple[Tensor, dict[str, Tensor]]:
    def readout(hidden: Tensor, head: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        return head_losses(hidden, head, batch.labels, targets, objective)

    return model(batch, mode="student", readout=readout)
