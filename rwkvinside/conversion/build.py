"""The parts of one stage: student, objective, engine, evaluation. What happens with them is in `build.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..config.precision import device_and_precision
from ..config.schema import Config, StageConfig
from ..data.batch import Batch
from ..errors import UserError
from ..evaluate.quality import Scores
from ..hybrid.adapters import adapter_directory, is_adapter, write_peft
from ..hybrid.assemble import adapters_of, assemble, frozen_weights_of
from ..hybrid.model import HybridModel
from ..losses.distillation import Objective
from ..modeling.hybrid_base import mixer_fields
from ..planning.flops import training_flops
from ..stages.param_groups import rate_groups
from ..stages.phases import Phase
from ..stages.prepare import optimizer_settings, stage_layers, student_spec, zero_settings
from ..stages.rows import Rows
from ..stages.steps import AlignStep, DistillStep, SftStep
from ..teacher.build import cached_teacher, separate_teacher
from ..teacher.load import load_teacher
from ..teacher.signals import OfflineTeacher, OnlineTeacher, SelfTeacher, Teacher
from ..training.batching import step_shape
from ..training.deepspeed_engine import DeepSpeedEngine
from ..training.frozen_weights import frozen_weights_digest, read_frozen_weights, write_frozen_weights
from ..training.gradient_watch import GradientWatch
from ..training.local_engine import LocalEngine
from ..training.process_group import Distributed
from ..training.protocols import Step
from ..training.schedule import Schedule


def make_student(
    config: Config,
    name: str,
    dtype: torch.dtype,
    before: dict[str, Tensor] | None,
    directory: Path,
    device: torch.device,
    text: Callable[[], Batch] | None = None,
    earlier: Path | None = None,
) -> HybridModel:
    """The student at the start of a stage, on the CPU.

    Args:
        name: of the stage, which says what is quantized.
        dtype: of the teacher's weights when they are loaded; mixers and all that was trained are fp32, with precision
            fp32 all that is not quantized.
        before: the student's tensors after the stage before; None at the start of a conversion.
        directory: of the stage; what it quantized when it began is read from there.
        device, text: with what to quantize otherwise, see `structure.assemble`.
        earlier: directory of the stage before; None at the start of a conversion.
    """
    torch.manual_seed(config.seed)
    lm = _load(config, dtype)
    structure = stage_layers(config, name)
    frozen_weights, kept = read_frozen_weights(directory), earlier and read_frozen_weights(earlier)
    student = assemble(lm, student_spec(config), structure, before, frozen_weights, device, text, kept)
    return student.float() if device_and_precision(config)[1] == "fp32" else student


def save_frozen_weights(student: HybridModel, directory: Path) -> None:
    """Write down what a stage has quantized, if that was not done before; for one process, before anything trains."""
    tensors = frozen_weights_of(student)
    if tensors and frozen_weights_digest(directory) is None:
        write_frozen_weights(directory, tensors)


def structure_settings(config: Config, name: str, directory: Path) -> dict:
    """JSON values that a resumed stage must share, so that its adapters and quantized weights mean the same."""
    return {"adapters": _adapter_settings(config, name), "frozen": frozen_weights_digest(directory)}


def check_adapters(config: Config, name: str, state: Mapping) -> None:
    """Refuse a checkpoint whose adapters would compute something else under the settings of a stage (`UserError`).

    Args:
        state: of the checkpoint.
    """
    there = state.get("settings", {}).get("adapters")
    here = _adapter_settings(config, name)
    if there and there != here:
        raise UserError(
            f"the weights to start from were trained with other adapters: {there} there, {here} here",
            "leave `adapters` as it was, or start a new run",
        )


def _adapter_settings(config: Config, name: str) -> list[dict]:
    return [spec.to_dict() for spec in stage_layers(config, name).adapters]


def write_adapters(config: Config, name: str, student: HybridModel, tensors: Mapping[str, Tensor], run: Path) -> None:
    """The adapters of a finished stage as PEFT directories `adapter`, `adapter-2`, ... in the stage's own.

    Args:
        student: has the adapters; its weights are not read.
        tensors: of the stage's last checkpoint.
        run: directory of the stage.
    """
    for i, (spec, own) in enumerate(adapters_of(student, stage_layers(config, name), tensors)):
        write_peft(run / adapter_directory(i), spec, own)


def _load(config: Config, dtype: torch.dtype):
    return load_teacher(config.teacher.path, config.teacher.revision, dtype)


def fingerprint(student: HybridModel) -> dict:
    """JSON values that tell students apart whose tensors do not fit each other, or would compute something else."""
    sizes = ("model_type", "num_hidden_layers", "vocab_size", "intermediate_size")
    values = {f"teacher.{name}": getattr(student.lm.config, name) for name in sizes}
    how = {"backend": "auto", "precision": "auto", "detach_first": False}  # the same student by another way
    mixers = mixer_fields({i: config.replace(**how) for i, config in student.mixer_configs.items()})
    values |= {name: value for name, value in mixers["mixer"].items() if name not in how}
    values |= {"mixer_layers": mixers["mixer_layers"]} if mixers["mixer_layers"] else {}
    return values | {"rwkv_layers": student.rwkv_layers, "attention_rope": student.spec.attention_rope}


def make_teacher(
    config: Config,
    name: str,
    source: str | None,
    student: HybridModel,
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    world: Distributed,
    dtype: torch.dtype,
    launched: bool,
) -> Teacher | None:
    """Where the teacher's side of a stage comes from, by what `prepare_stage` said; the rest of it is let go.

    Args:
        rows, tokenizer: which a cache of logits must be of.

    Returns:
        None when no exact one is at hand.
    """
    if source == "same":
        return SelfTeacher()
    student.release_teacher()
    if source == "cache":
        return cached_teacher(config, name, tokenizer, rows)
    return separate_teacher(config, config.stages[name], world, dtype, launched) if source == "separate" else None


def evaluation_teacher(teacher: Teacher | None) -> Teacher | None:
    """The teacher that an evaluation can ask: one on disk knows nothing but the rows of its stage."""
    return None if isinstance(teacher, OfflineTeacher) else teacher


def make_step(
    stage: StageConfig, student: HybridModel, teacher: Teacher | None, power: dict[int, float] | None
) -> Step:
    """The objective of a stage.

    Args:
        teacher: of distill.
        power: of align: mean squared norm of the teacher's attention output by layer.
    """
    step = _objective(stage, student, teacher, power)
    trainable = {name: p for name, p in student.canonical_parameters().items() if p.requires_grad}
    return GradientWatch(step, trainable) if any(map(is_adapter, trainable)) else step


def _objective(stage, student, teacher, power) -> Step:
    if stage.objective == "align":
        return AlignStep(power, checkpoint=stage.activation_checkpointing)
    if stage.activation_checkpointing:
        student.lm.train().activation_checkpointing_enable()  # transformers recomputes in training mode only
    objective = Objective(**stage.loss.model_dump())
    if stage.objective == "sft":
        return SftStep(objective)
    return DistillStep(teacher, objective)


def make_engine(
    config: Config,
    stage: StageConfig,
    phase: Phase,
    student: HybridModel,
    world: Distributed,
    precision: str,
    launched: bool,
) -> LocalEngine | DeepSpeedEngine:
    """The engine of a phase of a stage, with an optimizer over what `prepare_stage` has made trainable."""
    groups = {name: group.parameters for name, group in rate_groups(student, stage, phase).items()}
    settings = optimizer_settings(stage)
    if not launched:
        return LocalEngine(student, groups, settings, world, precision)
    return DeepSpeedEngine(
        student, groups, settings, world, precision, zero_settings(config), step_shape(stage, world.size)
    )


def work_of(stage: StageConfig, student: HybridModel, teacher: Teacher | None) -> float:
    """Operations for a token of a stage with what `prepare_stage` has made trainable; asked before an engine is."""
    source = "same" if isinstance(teacher, SelfTeacher) else None
    second = teacher.module.lm if isinstance(teacher, OnlineTeacher) else None
    return training_flops(student, stage, source, second).total


def make_schedule(stage: StageConfig, phase: Phase, student: HybridModel) -> Schedule:
    """Learning rates of the groups that train in a phase; a group that starts below lr_final stays where it is."""
    optim, groups = stage.optim, rate_groups(student, stage, phase)
    return Schedule(
        peak={name: group.rate for name, group in groups.items()},
        final={name: min(group.rate, optim.lr_final) for name, group in groups.items()},
        first={name: group.first for name, group in groups.items()},
        warmup_steps=optim.warmup_steps,
        shape=optim.decay.shape,
        start=optim.decay.start,
        end=optim.decay.end,
    )


def numbers(scores: Scores, teacher: Teacher | None) -> dict[str, float]:
    """What an evaluation of a student in training reports by name; without a teacher, its cross-entropy alone."""
    if teacher is None:
        return {"ce": scores.ce}
    return {"kl": scores.kl, "ce": scores.ce, "ce_teacher": scores.ce_teacher, "agreement": scores.agreement}
