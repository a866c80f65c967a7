"""What a run and its stages will do, resolved once (`config/resolve.py`).

Planning prints these objects, the conversion runs them; nobody asks the configuration again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..data.settings import DataConfig
from ..families.fused_layers import NOTHING, Fused
from ..losses.settings import DistillLossConfig
from ..teacher.kinds import TeacherKind
from ..teacher.settings import TeacherConfig
from ..training.batching import StepShape
from ..training.schedule import Schedule, StageLength
from ..training.settings import DeepSpeedConfig, OptimConfig
from .base import Stage
from .phases import Phase
from .settings import StageConfig

if TYPE_CHECKING:
    import torch

    from ..hybrid.layouts import LayerChoice
    from ..hybrid.model import HybridModel
    from ..hybrid.settings import LayerSpec, StudentConfig
    from .param_groups import RateGroup


@dataclass(frozen=True)
class RunSettings:
    """What all stages of a run share, resolved for this machine.

    Attributes:
        teacher: the model that is converted.
        student: what it becomes.
        data: texts of stages that name none themselves.
        seed: of initialization and data order.
        device: type of device, "cpu" or "cuda"; it need not be present on this machine.
        precision: arithmetic of the steps, "fp32" or "bf16".
        teacher_dtype: type in which the teacher is loaded.
        frozen_dtype: type of frozen weights that are not quantized, once a model is complete.
        ranks: processes that share the work.
        deepspeed: DeepSpeed trains.
        zero: how it then shards.
        endless_tokens: tokens that are read of a source without an end (see `data.sources`).
        choice: how the run decides which layers keep attention; None: that is given.
        fused: what of norms, gated MLPs and rotations runs as one kernel.
    """

    teacher: TeacherConfig
    student: StudentConfig
    data: DataConfig
    seed: int
    device: str
    precision: str
    teacher_dtype: torch.dtype
    frozen_dtype: torch.dtype
    ranks: int
    deepspeed: bool
    zero: DeepSpeedConfig
    endless_tokens: int
    choice: LayerChoice | None = None
    fused: Fused = NOTHING


@dataclass(frozen=True)
class Rates:
    """Learning rates of a stage.

    Attributes:
        lr: of mixers and adapters.
        lr_rest: of everything else.
        lr_final: after the decay.
        warmup_steps: of linear warm-up.
    """

    lr: float
    lr_rest: float
    lr_final: float
    warmup_steps: int


@dataclass(frozen=True)
class StagePlan:
    """A stage, resolved.

    Attributes:
        name: its key under `stages`.
        stage: its objective.
        settings: its section of the configuration.
        run: what it shares with the others.
        length: tokens, rows and steps.
        shape: how the rows of a step are cut.
        phases: what trains from which step on; one where nothing unfreezes.
        layers: quantized layers and adapters.
        signal_teacher: the model that teacher distributions come from.
        trials: of a stage that chooses layers by short distillations: how each candidate is trained in each round,
            by one process. They train on the rows of the stage `distill`, and mixers only.
    """

    name: str
    stage: Stage
    settings: StageConfig
    run: RunSettings
    length: StageLength
    shape: StepShape
    phases: tuple[Phase, ...]
    layers: LayerSpec
    signal_teacher: TeacherConfig
    trials: tuple[StagePlan, ...] = ()

    @property
    def title(self) -> str:
        """The stage's name, and its objective where that is another word."""
        return self.name if self.name == self.stage.objective else f"{self.name} ({self.stage.objective})"

    @property
    def asked_teacher(self) -> TeacherKind | None:
        """Where the configuration says the teacher's side comes from.

        None: wherever it is exact.
        """
        asked = self.settings.teacher
        return None if asked == "auto" else TeacherKind(asked)

    @property
    def optim(self) -> OptimConfig:
        """Settings of the optimizer, of a stage that trains."""
        if self.settings.optim is None:
            raise RuntimeError(f"stage {self.name} does not train")
        return self.settings.optim

    @property
    def rates(self) -> Rates:
        """Learning rates, of a stage that trains."""
        optim = self.optim
        if optim.lr is None or optim.lr_rest is None or optim.lr_final is None or optim.warmup_steps is None:
            raise RuntimeError(f"stage {self.name} has no learning rates: they are filled in by load_config")
        return Rates(optim.lr, optim.lr_rest, optim.lr_final, optim.warmup_steps)

    @property
    def loss(self) -> DistillLossConfig:
        """Settings of the loss, of a stage that has some."""
        if self.settings.loss is None:
            raise RuntimeError(f"stage {self.name} has a fixed loss")
        return self.settings.loss

    @contextmanager
    def marked(self, student: HybridModel) -> Iterator[None]:
        """Have as trainable, in the block, what the first phase trains of a student of which nothing trains."""
        student.set_trainable(self.phases[0].train)
        try:
            yield
        finally:
            student.set_trainable(())

    @property
    def row_count(self) -> int:
        """Rows that the stage reads."""
        return self.length.steps * self.length.rows_per_step

    def schedule(self, groups: Mapping[str, RateGroup]) -> Schedule:
        """Return the learning rates of a phase's groups.

        A group that starts below lr_final keeps its rate.

        Args:
            groups: from `param_groups.rate_groups`.
        """
        decay, rates = self.optim.decay, self.rates
        return Schedule(
            peak={name: group.rate for name, group in groups.items()},
            final={name: min(group.rate, rates.lr_final) for name, group in groups.items()},
            first={name: group.first for name, group in groups.items()},
            warmup_steps=rates.warmup_steps,
            shape=decay.shape,
            start=decay.start,
            end=decay.end,
        )


@dataclass(frozen=True)
class RunPlan:
    """A run, resolved.

    Attributes:
        settings: what all stages share; where layers are still to be chosen, what those before the choice share.
        stages: in the order in which each starts from the one before, including those that do not run now.
        selected: names of those that run.
    """

    settings: RunSettings
    stages: tuple[StagePlan, ...]
    selected: tuple[str, ...]

    def stage(self, name: str) -> StagePlan:
        """Return the plan of a stage by its name."""
        return next(plan for plan in self.stages if plan.name == name)
