"""Distill: the student's next-token distribution follows the teacher's.

The stage `long` does the same on longer rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import UserError
from ..support.settings import problem
from ..teacher.kinds import TeacherKind
from .base import SMALL, Stage, StageSize, language_model_defaults, narrow_rate

if TYPE_CHECKING:
    from torch import nn

    from ..data.batch import Batch
    from ..hybrid.model import HybridModel
    from ..losses.settings import DistillLossConfig
    from ..teacher.signals import Teacher
    from .plan import StagePlan
    from .settings import StageConfig
    from .steps import DistillStep

DIVERGENCES = {"forward": "KL(teacher || student)", "reverse": "KL(student || teacher)", "js": "Jensen-Shannon"}


class Distill(Stage):
    """A divergence from the teacher.

    Cross-entropy on the text is added where it has a weight.
    """

    objective = "distill"
    small = StageSize("2M", 512, 4096)
    large = StageSize("1B", 4096, 131072)
    follows_teacher = True
    has_loss = True
    has_graphs = True
    ce = 0.0

    @classmethod
    def defaults(cls, width: int, max_positions: int) -> dict:
        """Return default settings: everything trains."""
        return super().defaults(width, max_positions) | language_model_defaults(width, kl=1.0, ce=cls.ce)

    @classmethod
    def learning_rates(cls, width: int) -> dict[str, float]:
        """Return rates of which all but the mixers' are a tenth."""
        lr = narrow_rate(1e-4, 0.72, width)
        return {"lr": lr, "lr_rest": lr / 10, "lr_final": lr / 10 if width >= SMALL else lr / 100}

    @classmethod
    def check_settings(cls, settings: StageConfig) -> None:
        """Refuse a choice of teacher that contradicts itself."""
        super().check_settings(settings)
        kind, cache = settings.teacher, settings.teacher_cache
        if kind == TeacherKind.SELF.value and settings.names_second_model:
            raise problem("teacher same is the student itself: leave out teacher_model")
        if kind == TeacherKind.OFFLINE.value and not cache:
            raise problem("teacher cache needs teacher_cache: the directory that `rwkvinside data logits` wrote")
        if kind != TeacherKind.OFFLINE.value and cache:
            raise problem("teacher_cache {} is read by teacher cache only, not {}", cache, kind)

    @classmethod
    def check_loss(cls, loss: DistillLossConfig) -> None:
        """Refuse a loss without a teacher."""
        if not loss.kl:
            raise problem("loss.kl must be positive; objective sft trains without a teacher")

    def check(self, student: HybridModel, plan: StagePlan) -> None:
        """Refuse the student as its own teacher once shared weights were trained, and none at all."""
        super().check(student, plan)
        named = plan.settings.teacher_model.path is not None or plan.asked_teacher is TeacherKind.OFFLINE
        if plan.run.teacher.fresh and not named:
            raise UserError(
                f"stage {plan.name} has no teacher: the model was trained from nothing",
                f"name one of the same tokenizer: stages.{plan.name}.teacher_model.path",
            )
        changed = student.teacher_changes()
        if plan.asked_teacher is TeacherKind.SELF and changed:
            raise UserError(
                f"teacher: same cannot be used: {changed[0]} (and {len(changed) - 1} more) was trained, "
                "in the teacher too",
                "use teacher: separate, or train only mixer groups and adapters",
            )

    def teacher_kind(self, student: HybridModel, plan: StagePlan) -> TeacherKind:
        """Return the configured kind, or the cheapest exact one."""
        if plan.asked_teacher is not None:
            return plan.asked_teacher
        second = plan.settings.teacher_model.path is not None
        return TeacherKind.ONLINE if second or student.teacher_changes() else TeacherKind.SELF

    def step(
        self, model: nn.Module, teacher: Teacher | None, plan: StagePlan, sample: Callable[[int], list[Batch]]
    ) -> DistillStep:
        """Return a distillation step."""
        from .steps import DistillStep

        if teacher is None:
            raise RuntimeError("distillation needs a teacher")
        return DistillStep(teacher, plan.loss)

    def logit_models(self, kind: TeacherKind | None) -> int:
        """Return how many models' logits a step makes: a stored teacher makes none."""
        return 1 if kind is TeacherKind.OFFLINE else 2

    def loss_lines(self, plan: StagePlan, kind: TeacherKind | None) -> list[str]:
        """Return the loss with its weights, and the teacher."""
        if kind is None:
            raise RuntimeError("distillation needs a teacher")
        loss, second = plan.loss, plan.settings.teacher_model
        text = f"{loss.kl:g} {DIVERGENCES[loss.divergence]}"
        text += f" of its {loss.top_k} likeliest tokens" if loss.top_k else ""
        text += f" + {loss.ce:g} cross-entropy" if loss.ce else ""
        text += f" + {loss.router:g} balance of experts in each row" if loss.router else ""
        text += f" at temperature {loss.temperature:g}" if loss.temperature != 1 else ""
        teacher = kind.title
        if kind is TeacherKind.ONLINE:
            teacher += f", {second.path}" if second.path else " of the same weights"
            teacher += f", in {second.quantize}" if second.quantize else ""
            teacher += ", sharded over the ranks" if second.shard else ""
        elif kind is TeacherKind.OFFLINE:
            teacher += f" in {plan.settings.teacher_cache}"
        return [f"loss      {text}", f"teacher   {teacher}"]


class LongContext(Distill):
    """The stage `long`: gentle distillation on longer rows, with cross-entropy."""

    small = StageSize("1M", 1024, 16384)
    large = StageSize("100M", 16384, 1572864)
    ce = 0.1

    @classmethod
    def learning_rates(cls, width: int) -> dict[str, float]:
        """Return one rate for all: a tenth of distillation's, constant."""
        lr = narrow_rate(1e-4, 0.72, width) / 10
        return {"lr": lr, "lr_rest": lr, "lr_final": lr}
