"""Settings of a stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ..data.settings import StageData
from ..losses.settings import DistillLossConfig
from ..support.settings import Count, Section, problem
from ..teacher.settings import TeacherModelConfig
from ..training.schedule import StageLength
from ..training.settings import BatchConfig, EarlyStopConfig, OptimConfig
from .registry import OBJECTIVES, objective_class


class UnfreezeConfig(Section):
    """What starts to train later in a stage."""

    at_tokens: Count = Field(description="Tokens of the stage after which these join, with a new warm-up.")
    train: list[str] = Field(min_length=1, description="Groups or regular expressions that join `train`.")


class StageConfig(Section):
    """Settings of a stage."""

    objective: str = Field(description="What the stage minimizes: calibrate, align, choose, distill, sft or pretrain.")
    tokens: Count = Field(description="Tokens to train on.")
    train: list[str] = Field([], description="Groups of parameters, or regular expressions over their names.")
    data: StageData = Field(description="Rows of this stage.")
    batch: BatchConfig = Field(description="Size of a step.")
    optim: OptimConfig | None = Field(None, description="Optimizer; calibrate and choose have none.")
    loss: DistillLossConfig | None = Field(None, description="Loss; of distill and sft only.")
    teacher: Literal["auto", "same", "separate", "cache"] = Field(
        "auto",
        description="The student's frozen weights, a second model, or logits on disk; auto: same where it is exact.",
    )
    teacher_model: TeacherModelConfig = Field(
        TeacherModelConfig(), description="The second model of teacher: separate."
    )
    teacher_cache: str | None = Field(
        None, description="For teacher: cache: directory that `rwkvinside data logits` wrote."
    )
    quantize: list[str] | None = Field(None, description="What this stage quantizes; null: quantize.groups.")
    unfreeze: list[UnfreezeConfig] = Field([], description="What starts to train later in the stage.")
    stateful: bool = Field(
        False,
        description="Pretrain: rows go on from step to step, with the state in which a document was left.",
    )
    activation_checkpointing: Literal[False, True, "recurrence"] = Field(
        False,
        description="Compute activations again in the backward: true: of layers, in align of mixers; recurrence: what "
        "lies between the projections of mixers.",
    )
    cuda_graphs: Literal["auto", False, True] = Field(
        "auto",
        description="Launch forward and backward as one CUDA graph; align and distill on one GPU in bf16. "
        "auto: where nothing prevents it.",
    )
    evaluate_every_tokens: Count | None = Field(None, description="Evaluate this often; null: at the end of the stage.")
    early_stop: EarlyStopConfig | None = Field(
        None, description="End the stage once evaluations stop improving; null: train on all tokens."
    )

    @model_validator(mode="after")
    def _consistent(self) -> StageConfig:
        if self.batch.tokens < self.data.seq_len:
            raise problem("batch.tokens {} is less than data.seq_len {}", self.batch.tokens, self.data.seq_len)
        if self.objective not in OBJECTIVES:
            raise problem("objective {} is unknown; allowed: {}", self.objective, ", ".join(OBJECTIVES))
        objective_class(self.objective).check_settings(self)
        if self.early_stop is not None and self.evaluate_every_tokens is None:
            raise problem("early_stop counts evaluations, but there are none: set evaluate_every_tokens")
        last = (self.length.steps - 1) * self.length.tokens_per_step
        if late := [entry.at_tokens for entry in self.unfreeze if entry.at_tokens > last]:
            raise problem("unfreeze.at_tokens {} is after {}, where the last step begins", late[0], last)
        return self

    @property
    def length(self) -> StageLength:
        """Tokens, rows and steps of the stage."""
        return StageLength(self.tokens, self.batch.tokens, self.data.seq_len)

    @property
    def names_second_model(self) -> bool:
        """Whether it says anything about a second model as teacher."""
        return self.teacher_model != TeacherModelConfig()

    @property
    def chooses_teacher(self) -> bool:
        """Whether it says where the teacher's side comes from."""
        return self.teacher != "auto" or self.names_second_model or bool(self.teacher_cache)
