"""Pretrain: a language model from nothing, by cross-entropy on every token; there is no teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UserError
from ..support.text import rounded_bytes, spans
from .base import WHOLE_STAGE, Stage, StageSize
from .sft import SupervisedFineTuning

if TYPE_CHECKING:
    from ..data.rows import PackedRows, WholeDocuments
    from ..data.token_store import TokenStore
    from ..hybrid.model import HybridModel
    from ..teacher.kinds import TeacherKind
    from .plan import StagePlan


class Pretrain(SupervisedFineTuning):
    """Cross-entropy as in sft, on packed rows in streams, so that a step reads many documents however long they are.

    A document goes on in the next step's row, whose state starts anew, or is that of the row before (`stateful`).
    """

    objective = "pretrain"
    small = StageSize("3M", 256, 4096)
    large = StageSize("20B", 4096, 524288)
    cuts_documents = False
    packs_validation = True
    in_streams = True

    @classmethod
    def defaults(cls, width: int, max_positions: int) -> dict:
        """Return default settings: everything trains, matrices decay, rates fall over the whole stage."""
        optim = {"decay": dict(WHOLE_STAGE), "weight_decay": 0.1}
        return super().defaults(width, max_positions) | {"optim": optim}

    @classmethod
    def learning_rates(cls, width: int) -> dict[str, float]:
        """Return one rate for all, which falls to a tenth.

        6e-4 at a width of 768 and 4e-4 at 2560, as RWKV-7's models of 0.2 to 2.9 B parameters (arXiv 2503.14456); at
        smaller widths more, 6e-4 (768 / D)^0.8, which is between what suits RWKV and what suits attention (docs/lm.md).
        """
        lr = 6e-4 * (768 / width) ** (0.8 if width < 768 else 0.34)
        return {"lr": lr, "lr_rest": lr, "lr_final": lr / 10}

    @classmethod
    def warmup_steps(cls, steps: int) -> int:
        """Return 2 % of the steps, 10 to 2000."""
        return min(2000, max(10, round(0.02 * steps)), steps)

    def documents(self, store: TokenStore, seq_len: int, seed: int) -> PackedRows | WholeDocuments:
        """Lay documents out in rows: packed, one document after the other."""
        return Stage.documents(self, store, seq_len, seed)

    def check(self, student: HybridModel, plan: StagePlan) -> None:
        """Refuse a student that was made from a teacher, or whose rows cannot go on in constant memory."""
        from ..hybrid.row_states import unbounded_layers

        if not student.spec.from_nothing:
            raise UserError(
                f"stage {plan.name}: objective pretrain trains a model from nothing, and this one has a teacher",
                "use objective distill with loss.ce, or sft; train_rwkv.py makes a model from nothing",
            )
        if plan.settings.stateful and (layers := unbounded_layers(student)):
            raise UserError(
                f"stages.{plan.name}.stateful: attention of layers {spans(layers)} would keep all tokens of a document",
                "cut it to a window (student.attention_window=512), or train RWKV layers alone",
            )

    def teacher_kind(self, student: HybridModel, plan: StagePlan) -> TeacherKind | None:
        """Return None: there is no teacher."""
        return None

    def summary(self, student: HybridModel, plan: StagePlan, kind: TeacherKind | None) -> list[str]:
        """Return the lines of any training, and what goes from step to step."""
        from ..hybrid.row_states import row_bytes

        steps, *lines = super().summary(student, plan, kind)
        if plan.settings.stateful:
            streams, size = plan.length.rows_per_step, rounded_bytes(row_bytes(student))
            lines.insert(0, f"state     goes on from step to step in {streams} streams, {size} each")
        return [steps, *lines]
