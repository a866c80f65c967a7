"""Choose: which layers get their attention back, measured on the student whose layers are all RWKV.

The stage that turns this student into the hybrid that later stages train. How layers are measured: `layer_choice/`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from ..errors import UserError
from ..support.settings import problem
from .base import Backward, Stage, StageSize

if TYPE_CHECKING:
    from torch import nn

    from ..data.batch import Batch
    from ..hybrid.model import HybridModel
    from ..teacher.kinds import TeacherKind
    from ..teacher.signals import Teacher
    from .plan import StagePlan
    from .settings import StageConfig


class ChooseLayers(Stage):
    """Layers that keep attention, by the method of `student.attention_layers`.

    Nothing trains. Its tokens are those of the validation documents that it measures on at most.
    """

    objective = "choose"
    small = StageSize("50k", 512, 4096)
    large = StageSize("64k", 2048, 16384)
    backward = Backward.NOTHING
    needs_attention = True
    reads_targets = False
    chooses_layers = True

    @classmethod
    def defaults(cls, width: int, max_positions: int) -> dict:
        """Return default settings: nothing is quantized, so that the mixers meet the teacher itself."""
        return super().defaults(width, max_positions) | {"quantize": []}

    @classmethod
    def learning_rates(cls, width: int) -> dict[str, float]:
        """Return none: nothing trains."""
        return {}

    @classmethod
    def check_settings(cls, settings: StageConfig) -> None:
        """Refuse settings of training."""
        if settings.optim is not None or settings.train or settings.unfreeze:
            raise problem("objective choose does not train: leave out optim, train and unfreeze")
        super().check_settings(settings)

    def check(self, student: HybridModel, plan: StagePlan) -> None:
        """Refuse quantized layers and adapters, and a student that has nothing to choose from."""
        super().check(student, plan)
        if plan.layers.has_frozen_weights or plan.layers.adapters:
            raise UserError(
                f"stage {plan.name} chooses layers, which a student with quantized layers or adapters does not change",
                f"leave stages.{plan.name}.quantize empty, and add adapters in a run that names its layers",
            )
        if len(student.rwkv_layers) < student.lm.config.num_hidden_layers:
            raise UserError(
                f"stage {plan.name} chooses among all layers, but some keep their attention already",
                "let one stage choose them, or name them",
            )

    def step(
        self, model: nn.Module, teacher: Teacher | None, plan: StagePlan, sample: Callable[[int], list[Batch]]
    ) -> NoReturn:
        """Raise an error: there are no optimizer steps."""
        raise TypeError("choosing layers has no optimizer steps")

    def summary(self, student: HybridModel, plan: StagePlan, kind: TeacherKind | None) -> list[str]:
        """Return what is chosen, how, and on how much text."""
        choice = plan.run.choice
        if choice is None:
            raise RuntimeError(f"stage {plan.name} has nothing to choose")
        limits = {"max_gap": "RWKV", "max_run": "attention"}
        rules = [f", at most {n} {of} layers in a row" for name, of in limits.items() if (n := getattr(choice, name))]
        return [
            f"chooses   {choice.keep} of {len(student.rwkv_layers)} layers that keep attention, by {choice.choose}"
            f"{''.join(rules)}"
        ]
