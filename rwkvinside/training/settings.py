"""Settings of training: steps, optimizer, checkpoints, DeepSpeed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ..support.settings import Count, Fraction, Positive, Rate, Section, problem


class BatchConfig(Section):
    """Size of an optimizer step."""

    tokens: Count = Field(
        description="Tokens of an optimizer step over all ranks; left out: by width, fewer in a short align or distill."
    )
    micro_rows: Positive | None = Field(
        None,
        description="Rows that run at a time on a rank; null: about 4096 tokens, up to 32768 where a GPU has room.",
    )


class DecayConfig(Section):
    """Decay of the learning rate."""

    shape: Literal["cosine", "linear"] = Field("cosine", description="Curve from the learning rate to lr_final.")
    start: Fraction = Field(0.0, description="Part of the stage's tokens after which the decay starts.")
    end: Fraction = Field(1.0, description="Part of the stage's tokens at which lr_final is reached.")

    @model_validator(mode="after")
    def _ordered(self) -> DecayConfig:
        if self.end < self.start:
            raise problem("ends at {} before it starts at {}", self.end, self.start)
        return self


Multiple = Annotated[str, Field(pattern=r"^\d*\.?\d+x$")]  # of another number, as in 0.3x


class OptimConfig(Section):
    """Optimizer and learning rates of a stage."""

    lr: Rate | None = Field(None, description="Learning rate of the mixers; null: by the teacher's width.")
    lr_rest: Rate | None = Field(None, description="Learning rate of all else; null: by the teacher's width.")
    rates: dict[str, Rate | Multiple] = Field(
        {},
        description="Learning rates of groups, or regular expressions over names; 0.3x: of lr; the first match counts.",
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Factor of the learning rates from a layer to the one before it; the last has them in full."
    )
    kind: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = Field(
        "adamw", description="AdamW with fp32 states, or bitsandbytes' with 8-bit ones, paged: on CUDA only."
    )
    lr_final: Rate | None = Field(
        None, description="Learning rate after the decay, of what was above it; null: from lr."
    )
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="Steps of linear warm-up; null: 50 (in a short align a quarter, in others a tenth), of sft 3 %.",
    )
    decay: DecayConfig = Field(DecayConfig(), description="Decay of the learning rate.")
    clip: Rate = Field(1.0, description="Largest norm of the gradient; 0: no limit.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.95), description="Adam's two decay rates."
    )
    eps: Annotated[float, Field(gt=0)] = Field(1e-8, description="Adam's epsilon.")
    weight_decay: Rate = Field(0.0, description="Weight decay of linear layers and embeddings; all else has none.")


class CheckpointConfig(Section):
    """When to save, and how much stays on disk."""

    every_steps: Positive = Field(500, description="Optimizer steps between checkpoints.")
    keep: Positive = Field(2, description="Newest checkpoints of a stage that stay on disk, and the best one.")
    continue_from: Literal["last", "best"] = Field(
        "last", description="Checkpoint of the stage before that a stage starts from; best: on validation data."
    )
    on_disk_full: Literal["stop", "continue"] = Field(
        "stop", description="When a checkpoint does not fit on the disk: stop the run, or go on to the next try."
    )


class EarlyStopConfig(Section):
    """When a stage ends before its tokens are used up."""

    patience: Positive = Field(description="Evaluations in a row without improvement after which the stage ends.")
    min_delta: Rate = Field(
        0.0, description="Nats by which validation KL (without a teacher cross-entropy) must fall to count as improved."
    )


class SamplesConfig(Section):
    """What the student writes while it is trained, the likeliest tokens."""

    every_tokens: Count | None = Field(None, description="Write this often; null: at the end of the run only.")
    prompts: list[str] = Field([], description="Beginnings of texts; none: that of the first validation document.")
    tokens: Annotated[int, Field(ge=0)] = Field(32, description="Tokens to write after each; 0: no samples at all.")


class DeepSpeedConfig(Section):
    """How DeepSpeed shards."""

    zero_stage: Literal[0, 1, 2, 3] = Field(
        1, description="ZeRO shards: 0 nothing, 1 optimizer states, 2 gradients too, 3 parameters too."
    )
    offload_optimizer: bool = Field(False, description="Keep optimizer states in CPU memory.")
    offload_parameters: bool = Field(False, description="ZeRO 3: keep parameters in CPU memory.")
    bf16_weights: bool = Field(
        False, description="In bf16: DeepSpeed's own bf16 weights with fp32 masters; false: fp32 weights, autocast."
    )
    config: dict[str, Any] | None = Field(None, description="DeepSpeed's own settings (--deepspeed FILE), over ours.")

    @property
    def helps_one_process(self) -> bool:
        """Whether a process that is alone would compute or keep something otherwise without DeepSpeed."""
        return self.offload_optimizer or self.offload_parameters or self.bf16_weights or self.config is not None
