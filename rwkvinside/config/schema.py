"""The configuration of a run: the sections of all components, put together."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ..data.settings import DataConfig
from ..errors import UserError
from ..hybrid.settings import AdapterConfig, QuantizeConfig, StudentConfig
from ..stages.settings import StageConfig
from ..support.names import ALLOWED, is_name
from ..support.settings import Positive, Section, problem
from ..support.system import NO_MPS
from ..teacher.settings import TeacherConfig
from ..training.settings import CheckpointConfig, DeepSpeedConfig, SamplesConfig


class Config(Section):
    """All settings of a run."""

    teacher: TeacherConfig = Field(description="The model to convert.")
    recipe: str | None = Field(
        None, description="Shipped recipe: radlads, hxa079, halo, simultaneous, windowed; null: the defaults."
    )
    variant: list[str] = Field([], description="Shipped variants for a machine, such as one-card; later beat earlier.")
    student: StudentConfig = Field(StudentConfig(), description="What it becomes.")
    quantize: QuantizeConfig = Field(QuantizeConfig(), description="Frozen weights in 4 or 8 bits.")
    adapters: list[AdapterConfig] = Field([], description="Adapters; they train in stages whose train has `adapters`.")
    data: DataConfig = Field(DataConfig(), description="Texts.")
    run: list[str] = Field(description="Stages to run, in order; each starts from the last one's result.")
    stages: dict[str, StageConfig] = Field(description="Settings by stage name; own names need an objective.")
    out: str = Field(min_length=1, description="Run directory; must be new or empty unless resumed.")
    seed: Annotated[int, Field(ge=0, lt=2**64)] = Field(0, description="Seed of initialization and data order.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to train; auto: cuda when there is one.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Arithmetic; bf16 keeps fp32 masters; auto: bf16 on cuda, fp32 on CPU."
    )
    fused_layers: Literal["auto", True, False] = Field(
        "auto", description="Norms, gated MLPs (by liger-kernel), rotations as single kernels; auto: on cuda, if there."
    )
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="When to save, and how much is kept.")
    deepspeed: DeepSpeedConfig = Field(
        DeepSpeedConfig(), description="Several processes, or one that offloads, started by a launcher."
    )
    loggers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        [], description="Where metrics go in addition to metrics.jsonl; each is an optional extra."
    )
    samples: SamplesConfig = Field(SamplesConfig(), description="What the student writes while it is trained.")
    log_every: Positive = Field(10, description="Optimizer steps between lines on the console.")

    @field_validator("device", mode="before")
    @classmethod
    def _no_mps(cls, device: object) -> object:
        if device == "mps":
            raise problem(NO_MPS)
        return device

    @model_validator(mode="after")
    def _one_start(self) -> Config:
        if self.teacher.fresh != self.student.from_nothing:
            raise problem(
                "teacher.fresh and student.init scratch go together: a model is made from nothing, or it is not"
            )
        return self

    @field_validator("stages")
    @classmethod
    def _directories(cls, stages: dict[str, StageConfig]) -> dict[str, StageConfig]:
        if wrong := [name for name in stages if not is_name(name)]:
            raise problem("stage {} cannot be the name of a directory; {}", repr(wrong[0]), ALLOWED)
        return stages

    @field_validator("run")
    @classmethod
    def _each_once(cls, run: list[str]) -> list[str]:
        if not run:
            raise problem("is empty; name at least one stage")
        if repeated := sorted({name for name in run if run.count(name) > 1}):
            raise problem("lists {} twice; give a second pass another name", ", ".join(repeated))
        return run


def check_config(given: object) -> None:
    """Refuse what is no configuration, such as the name of its file.

    Raises:
        UserError: says what was given.
    """
    if not isinstance(given, Config):
        cause = f"a configuration is expected, not {type(given).__name__} {given!r:.60}"
        raise UserError(cause, 'rw.load_config(["run.yaml"]) reads one')
