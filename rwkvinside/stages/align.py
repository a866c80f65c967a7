"""Align: each mixer imitates its layer's attention.

It reads the teacher's own hidden states (RADLADS step 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .base import WHOLE_STAGE, Backward, Stage, StageSize, narrow_rate

if TYPE_CHECKING:
    from torch import nn

    from ..data.batch import Batch
    from ..teacher.signals import Teacher
    from .plan import StagePlan
    from .steps import AlignStep

NORM_TOKENS = 16384  # on which the weights of the loss are measured


class Align(Stage):
    """Squared error of each mixer relative to its layer's attention.

    The mixers alone train.
    """

    objective = "align"
    small = StageSize("2M", 512, 4096)
    large = StageSize("320M", 512, 16384)
    backward = Backward.MIXERS
    needs_attention = True
    reads_targets = False
    shrinks_steps = True
    has_graphs = True

    @classmethod
    def defaults(cls, width: int, max_positions: int) -> dict:
        """Return default settings: mixers train, with a decay over the whole stage."""
        return super().defaults(width, max_positions) | {"train": ["mixer"], "optim": {"decay": dict(WHOLE_STAGE)}}

    @classmethod
    def learning_rates(cls, width: int) -> dict[str, float]:
        """Return one rate for all, which ends at a hundredth."""
        lr = narrow_rate(1e-3, 0.83, width)
        return {"lr": lr, "lr_rest": lr, "lr_final": lr / 100}

    @classmethod
    def warmup_steps(cls, steps: int) -> int:
        """Return 50 steps, in a short stage a quarter, at least 20.

        The full rate undoes part of the calibration; a stage too short to mend that never reaches it.
        """
        return min(50, max(20, steps // 4))

    def step(
        self, model: nn.Module, teacher: Teacher | None, plan: StagePlan, sample: Callable[[int], list[Batch]]
    ) -> AlignStep:
        """Return an alignment step, after measuring the weights of its loss."""
        from ..hybrid.calibration import teacher_norms
        from .steps import AlignStep

        norms, _ = teacher_norms(model, sample(NORM_TOKENS))
        return AlignStep(norms)
