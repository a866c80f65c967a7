"""Choose: which layers get their attention back, measured on the student whose layers are all RWKV.

The stage that turns this student into the hybrid that later stages train. How layers are measured: `layer_choice/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import UserError
from ..support.text import rounded_count, short_count
from .base import StageSize
from .untrained import UntrainedStage

if TYPE_CHECKING:
    from ..hybrid.model import HybridModel
    from ..teacher.kinds import TeacherKind
    from .plan import StagePlan


class ChooseLayers(UntrainedStage):
    """Layers that keep attention, by the method of `student.attention_layers`.

    Nothing trains that is kept. Its tokens are those of the validation documents that it measures on at most.
    """

    objective = "choose"
    small = StageSize("50k", 512, 4096)
    large = StageSize("64k", 2048, 16384)
    chooses_layers = True

    @classmethod
    def defaults(cls, width: int, max_positions: int) -> dict:
        """Return default settings: nothing is quantized, so that the mixers meet the teacher itself."""
        return super().defaults(width, max_positions) | {"quantize": []}

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

    def summary(self, student: HybridModel, plan: StagePlan, kind: TeacherKind | None) -> list[str]:
        """Return what is chosen, how, and on how much text."""
        choice = plan.run.choice
        if choice is None:
            raise RuntimeError(f"stage {plan.name} has nothing to choose")
        limits = {"max_gap": "RWKV", "max_run": "attention"}
        rules = [f", at most {n} {of} layers in a row" for name, of in limits.items() if (n := getattr(choice, name))]
        return [
            f"chooses   {choice.keep} of {len(student.rwkv_layers)} layers that keep attention, by {choice.method}"
            f"{''.join(rules)}",
            *trial_lines(plan.trials, len(student.rwkv_layers), plan.run.ranks),
        ]


def trial_lines(trials: Sequence[StagePlan], layers: int, ranks: int) -> list[str]:
    """Return what short distillations of every candidate are, and how many; none where there are none.

    Args:
        trials: the rounds.
        layers: to choose from.
        ranks: processes that share the candidates.
    """
    if not trials:
        return []
    rounds = ", ".join(short_count(trial.length.total_tokens) for trial in trials)
    read = sum(trial.length.tokens_read for trial in trials)
    rates = trials[-1].rates
    return [
        "trials    mixers train with each layer's attention back, and with none, always from the same start,",
        f"          on {rounds} tokens, until three rounds in succession (the first trains nothing) choose the same",
        f"          rate {rates.lr:.3g} as in stage {trials[-1].name}; {layers + 1} x {rounded_count(read)} = "
        f"{rounded_count((layers + 1) * read)} tokens at most{', each on one rank' * (ranks > 1)}",
    ]
