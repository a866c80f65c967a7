"""Supervised fine-tuning: cross-entropy on labeled positions.

Labeled positions are completions; there is no teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..losses.settings import DistillLossConfig
from ..support.settings import problem
from .base import Stage, StageSize, language_model_defaults, narrow_rate

if TYPE_CHECKING:
    from torch import nn

    from ..data.batch import Batch
    from ..data.rows import PackedRows, WholeDocuments
    from ..data.token_store import TokenStore
    from ..teacher.kinds import TeacherKind
    from ..teacher.signals import Teacher
    from .plan import StagePlan
    from .steps import SftStep


class SupervisedFineTuning(Stage):
    """Cross-entropy on completions; whole documents share rows."""

    objective = "sft"
    small = StageSize("1M", 512, 4096)
    large = StageSize("20M", 4096, 131072)
    has_loss = True
    cuts_documents = True

    @classmethod
    def defaults(cls, width: int, max_positions: int) -> dict:
        """Return default settings: everything trains."""
        return super().defaults(width, max_positions) | language_model_defaults(width, kl=0.0, ce=1.0)

    @classmethod
    def learning_rates(cls, width: int) -> dict[str, float]:
        """Return one rate for all: a tenth of distillation's, constant."""
        lr = narrow_rate(1e-4, 0.72, width) / 10
        return {"lr": lr, "lr_rest": lr, "lr_final": lr}

    @classmethod
    def warmup_steps(cls, steps: int) -> int:
        """Return 3 % of the steps, at least one."""
        return max(1, round(0.03 * steps))

    @classmethod
    def check_loss(cls, loss: DistillLossConfig) -> None:
        """Refuse all but cross-entropy."""
        if loss.kl or loss.ce != 1:
            raise problem("objective {} has loss.kl 0 and loss.ce 1; objective distill mixes both", cls.objective)
        if loss != DistillLossConfig(kl=0, ce=1, router=loss.router, chunk_tokens=loss.chunk_tokens):
            raise problem(
                "objective {} has no divergence: leave out loss.divergence, loss.top_k, loss.temperature", cls.objective
            )

    def documents(self, store: TokenStore, seq_len: int, seed: int) -> PackedRows | WholeDocuments:
        """Lay documents out in rows: several whole ones in a row, kept apart."""
        from ..data.rows import WholeDocuments

        return WholeDocuments(store, seq_len, seed)

    def step(
        self, model: nn.Module, teacher: Teacher | None, plan: StagePlan, sample: Callable[[int], list[Batch]]
    ) -> SftStep:
        """Return a step of cross-entropy."""
        from ..losses.next_token import NextTokenLoss
        from .steps import SftStep

        return SftStep(NextTokenLoss(plan.loss.chunk_tokens), plan.loss.router)

    def logit_models(self, kind: TeacherKind | None) -> int:
        """Return one: the student."""
        return 1

    def loss_lines(self, plan: StagePlan, kind: TeacherKind | None) -> list[str]:
        """Return the loss with its weight."""
        router = f" + {plan.loss.router:g} balance of experts in each row" if plan.loss.router else ""
        return [f"loss      {plan.loss.ce:g} cross-entropy{router}"]
