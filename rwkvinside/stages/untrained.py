"""What stages share that have no optimizer steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from ..support.settings import problem
from .base import Backward, Stage

if TYPE_CHECKING:
    from torch import nn

    from ..data.batch import Batch
    from ..teacher.signals import Teacher
    from .plan import StagePlan
    from .settings import StageConfig


class UntrainedStage(Stage):
    """A stage that reads its teacher's attention and trains nothing."""

    backward = Backward.NOTHING
    needs_attention = True
    reads_targets = False

    @classmethod
    def learning_rates(cls, width: int) -> dict[str, float]:
        """Return none: nothing trains."""
        return {}

    @classmethod
    def check_settings(cls, settings: StageConfig) -> None:
        """Refuse settings of training."""
        if settings.optim is not None or settings.train or settings.unfreeze:
            raise problem("objective {} does not train: leave out optim, train and unfreeze", cls.objective)
        super().check_settings(settings)

    def step(
        self, model: nn.Module, teacher: Teacher | None, plan: StagePlan, sample: Callable[[int], list[Batch]]
    ) -> NoReturn:
        """Raise an error: there are no optimizer steps."""
        raise TypeError(f"objective {self.objective} has no optimizer steps")
