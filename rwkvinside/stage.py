"""The parts of one stage: student, objective, engine, evaluation. What happens with them is in `build.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from .config import Config, StageConfig
from .data import Batch
from .distill.hybrid import HybridModel
from .distill.steps import AlignStep, DistilStep, SftStep
from .distill.teacher import SameWeights, SeparateTeacher, Teacher, load_teacher
from .evaluate.quality import compare
from .models import student_spec
from .training.engine import DeepSpeedEngine
from .training.in_process import InProcessEngine
from .training.optimizer import OptimizerSettings
from .training.schedule import Schedule
from .training.step import Step
from .training.world import World


def make_student(config: Config, dtype: torch.dtype, before: dict[str, Tensor] | None) -> HybridModel:
    """The student at the start of a stage, on the CPU.

    Args:
        dtype: of the teacher's weights; mixers and all that was trained are fp32.
        before: the student's tensors after the stage before; None at the start of a conversion.
    """
    torch.manual_seed(config.seed)
    student = HybridModel.from_teacher(_load(config, dtype), student_spec(config)).eval()
    if before is not None:
        parameters = student.canonical_parameters()
        for name in before.keys() & parameters.keys():  # keep what training gained over the teacher's precision
            parameters[name].data = parameters[name].data.to(before[name].dtype)
        student.load_student_state_dict(before)
    return student


def _load(config: Config, dtype: torch.dtype):
    return load_teacher(config.teacher.path, config.teacher.revision, dtype)


def fingerprint(student: HybridModel) -> dict:
    """JSON values that tell students apart whose tensors do not fit each other, or would compute something else."""
    sizes = ("model_type", "num_hidden_layers", "vocab_size", "intermediate_size")
    values = {f"teacher.{name}": getattr(student.lm.config, name) for name in sizes}
    mixer = student.mixer_config.to_dict()
    values |= {name: value for name, value in mixer.items() if name not in ("backend", "precision", "detach_first")}
    return values | {"rwkv_layers": student.rwkv_layers, "attention_rope": student.spec.attention_rope}


def make_teacher(config: Config, source: str | None, student: HybridModel, world: World, dtype: torch.dtype):
    """Where the teacher's side of a stage comes from, by what `prepare_stage` said; the rest of it is let go.

    Returns:
        A `Teacher`, or None when no exact one is at hand.
    """
    if source == "same":
        return SameWeights()
    student.release_teacher()
    return SeparateTeacher(_load(config, dtype).to(world.device)) if source == "separate" else None


def make_step(
    stage: StageConfig, student: HybridModel, teacher: Teacher | None, power: dict[int, float] | None
) -> Step:
    """The objective of a stage.

    Args:
        teacher: of distil.
        power: of align: mean squared norm of the teacher's attention output by layer.
    """
    if stage.objective == "align":
        return AlignStep(power, checkpoint=stage.activation_checkpointing)
    if stage.activation_checkpointing:
        student.lm.train().activation_checkpointing_enable()  # transformers recomputes in training mode only
    if stage.objective == "sft":
        return SftStep(stage.loss.chunk_tokens)
    return DistilStep(teacher, **stage.loss.model_dump())


def make_engine(
    config: Config, stage: StageConfig, student: HybridModel, world: World, precision: str, launched: bool
) -> InProcessEngine | DeepSpeedEngine:
    """The engine of a stage, with an optimizer over what `prepare_stage` has made trainable."""
    groups = {name: members for name, members in student.trainable_groups().items() if members}
    optim = stage.optim
    settings = OptimizerSettings(optim.betas, optim.eps, optim.weight_decay, optim.clip)
    if not launched:
        return InProcessEngine(student, groups, settings, world, precision)
    zero = config.deepspeed
    return DeepSpeedEngine(student, groups, settings, world, precision, zero.zero_stage, zero.config)


def make_schedule(stage: StageConfig, student: HybridModel) -> Schedule:
    """Learning rates of the groups that train; a group that starts below lr_final stays where it is."""
    optim = stage.optim
    rates = {"mixer": optim.lr, "rest": optim.lr_rest}
    peak = {name: rates[name] for name, members in student.trainable_groups().items() if members}
    final = {name: min(rate, optim.lr_final) for name, rate in peak.items()}
    return Schedule(peak, final, optim.warmup_steps, optim.decay.shape, optim.decay.start, optim.decay.end)


def make_evaluate(
    student: HybridModel,
    teacher: Teacher | None,
    batches: Sequence[Batch],
    autocast: Callable[[], AbstractContextManager],
) -> Callable[[], dict[str, float]]:
    """A function that judges the student on whole documents.

    Args:
        teacher: None when the student's own weights are the teacher's no more and there is no second model.
        batches: from `judged_batches`; moved to the student's device one at a time.
        autocast: makes the context of the precision that the stage trains in.

    Returns:
        kl, ce, ce_teacher and agreement by name; ce alone without a teacher.
    """
    last: list[Tensor] = []

    def of_student(batch: Batch) -> Tensor:
        batch = batch.to(next(student.parameters()).device)
        last[:] = [student(batch, mode="student", readout=lambda hidden, head: head(hidden))]
        return last[0]

    def of_teacher(batch: Batch) -> Tensor:
        if teacher is None:
            return last[0]
        hidden, head = teacher(student, batch.to(last[0].device))
        return head(hidden)

    def evaluate() -> dict[str, float]:
        with autocast():
            found = compare(of_student, of_teacher, batches).scores
        if teacher is None:
            return {"ce": found.ce}
        return {"kl": found.kl, "ce": found.ce, "ce_teacher": found.ce_teacher, "agreement": found.agreement}

    return evaluate
