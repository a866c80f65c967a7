"""From a configuration to the student of a stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM

from ..config.schema import Config
from ..errors import UserError
from ..hybrid.assemble import LayerSpec
from ..hybrid.model import HybridModel, StudentSpec
from ..teacher.load import teacher_config
from ..teacher.signals import check_same_weights
from ..training.deepspeed_config import ZeroSettings
from ..training.optimizer import OptimizerSettings
from .settings import StageConfig


def student_spec(config: Config) -> StudentSpec:
    """What the student is."""
    return StudentSpec.from_fields(config.student.model_dump())


def meta_student(config: Config) -> HybridModel:
    """The student's shapes without its weights, on the meta device."""
    with torch.device("meta"):
        teacher = AutoModelForCausalLM.from_config(teacher_config(config))
    return HybridModel.from_teacher(teacher, student_spec(config))


def stage_layers(config: Config, name: str) -> LayerSpec:
    """What a stage quantizes, and the adapters."""
    return LayerSpec.from_fields(config.model_dump(), name)


def optimizer_settings(stage: StageConfig) -> OptimizerSettings:
    """The optimizer of a training stage."""
    optim = stage.optim
    return OptimizerSettings(optim.betas, optim.eps, optim.weight_decay, optim.clip, optim.kind)


def zero_settings(config: Config) -> ZeroSettings:
    """How DeepSpeed is to shard, when a launcher starts the run."""
    zero = config.deepspeed
    return ZeroSettings(
        zero.zero_stage, zero.offload_optimizer, zero.offload_parameters, zero.bf16_weights, zero.config
    )


def prepare_stage(model: HybridModel, stage: StageConfig, train: Sequence[str] | None = None) -> str | None:
    """Set what the stage trains and say which exact teacher it has: the student's own frozen weights ("same"), a second
    model ("separate"), its logits on disk ("cache"), or none (None).

    Args:
        train: patterns of a later phase of the stage (`freezing.phases`); None: those that it starts with.

    Raises:
        UserError: a pattern that matches nothing; the student's own weights are needed as teacher and were trained.
    """
    model.set_trainable(stage.train if train is None else train)
    changed = model.teacher_changes()
    if stage.objective in ("calibrate", "align"):
        if changed:
            raise UserError(
                f"objective {stage.objective} needs the teacher's own weights, but {changed[0]} is trained here or "
                "before",
                "train mixer groups only, and run this stage before those that train more",
            )
        if adapters := model.adapters_beside_mixers():
            raise UserError(
                f"objective {stage.objective} runs all but the mixers without adapters: {adapters[0]} learns nothing",
                "leave adapters out of the stage's train, or put them on mixers",
            )
    if stage.objective == "calibrate" and (fitted := model.mixer_names() - set(model.canonical_parameters())):
        raise UserError(
            f"objective calibrate fits the mixers, but {min(fitted)} is quantized",
            "set stages.<name>.quantize of this stage to groups without mixers",
        )
    if stage.objective == "distill" and stage.teacher == "same":
        check_same_weights(changed)
    if stage.objective != "distill":
        return None if changed else "same"
    if stage.teacher == "cache":
        return "cache"
    other = stage.teacher == "separate" or stage.teacher_model.path is not None
    return "separate" if changed or other else "same"
