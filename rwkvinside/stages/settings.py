"""Settings of a stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ..data.settings import StageData
from ..losses.settings import LossConfig
from ..support.settings import Count, Section, problem
from ..teacher.settings import TeacherModelConfig
from ..training.settings import BatchConfig, OptimConfig


class UnfreezeConfig(Section):
    at_tokens: Count = Field(description="Tokens of the stage after which these join, with a warm-up of their own.")
    train: list[str] = Field(min_length=1, description="Groups or regular expressions that join `train`.")


class StageConfig(Section):
    objective: Literal["calibrate", "align", "distill", "sft"] = Field(description="What the stage minimizes.")
    tokens: Count = Field(description="Tokens to train on.")
    train: list[str] = Field([], description="Groups of parameters, or regular expressions over their names.")
    data: StageData = Field(description="Rows of this stage.")
    batch: BatchConfig = Field(description="Size of a step.")
    optim: OptimConfig | None = Field(None, description="Optimizer; calibrate has none.")
    loss: LossConfig | None = Field(None, description="Loss; of distill and sft only.")
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
    activation_checkpointing: bool = Field(False, description="Recompute activations in the backward.")
    evaluate_every_tokens: Count | None = Field(None, description="Evaluate this often; null: at the end of the stage.")

    @model_validator(mode="after")
    def _consistent(self) -> StageConfig:
        if self.batch.tokens < self.data.seq_len:
            raise problem("batch.tokens {} is less than data.seq_len {}", self.batch.tokens, self.data.seq_len)
        if self.objective == "calibrate" and (self.optim is not None or self.train or self.unfreeze):
            raise problem("objective calibrate does not train: leave out optim, train and unfreeze")
        if self.objective != "calibrate" and not self.train:
            raise problem("train is empty; name groups such as mixer, or regular expressions")
        if self.objective != "calibrate" and self.optim is None:
            raise problem("optim is null; leave it out for the defaults")
        last = (self.steps - 1) * self.rows * self.data.seq_len
        if late := [entry.at_tokens for entry in self.unfreeze if entry.at_tokens > last]:
            raise problem("unfreeze.at_tokens {} is after {}, where the last step begins", late[0], last)
        if self.objective in ("calibrate", "align") and self.loss is not None:
            raise problem("objective {} has a fixed loss: leave out loss", self.objective)
        if self.objective in ("distill", "sft") and self.loss is None:
            raise problem("loss is null; leave it out for the defaults")
        if self.objective == "distill" and not self.loss.kl:
            raise problem("loss.kl must be positive; objective sft trains without a teacher")
        if self.objective == "sft" and (self.loss.kl or self.loss.ce != 1):
            raise problem("objective sft has loss.kl 0 and loss.ce 1; objective distill mixes both")
        if self.objective == "sft" and self.loss != LossConfig(kl=0, ce=1, chunk_tokens=self.loss.chunk_tokens):
            raise problem("objective sft has no divergence: leave out loss.divergence, loss.top_k, loss.temperature")
        self._check_teacher()
        return self

    def _check_teacher(self) -> None:
        second = self.teacher_model != TeacherModelConfig()
        if self.objective != "distill" and (self.teacher != "auto" or second or self.teacher_cache):
            raise problem("only objective distill has a choice of teacher: leave out teacher, teacher_model and cache")
        if self.teacher == "same" and second:
            raise problem("teacher same is the student itself: leave out teacher_model")
        if self.teacher == "cache" and not self.teacher_cache:
            raise problem("teacher cache needs teacher_cache: the directory that `rwkvinside data logits` wrote")
        if self.teacher != "cache" and self.teacher_cache:
            raise problem("teacher_cache {} is read by teacher cache only, not {}", self.teacher_cache, self.teacher)

    @property
    def rows(self) -> int:
        """Rows of an optimizer step."""
        return self.batch.tokens // self.data.seq_len

    @property
    def steps(self) -> int:
        """Optimizer steps of the stage."""
        return -(-self.tokens // (self.rows * self.data.seq_len))
