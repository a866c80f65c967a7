"""From a configuration to models: the student's specification, the teacher on the meta device or with its weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from .config import Config, StageConfig, TeacherConfig
from .distill.hybrid import HybridModel, StudentSpec
from .distill.structure import Structure
from .distill.teacher import check_same_weights
from .errors import UserError
from .training.deepspeed_config import ZeroSettings
from .training.optimizer import OptimizerSettings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def student_spec(config: Config) -> StudentSpec:
    """What the student is."""
    return StudentSpec.from_fields(config.student.model_dump())


def device_and_precision(config: Config) -> tuple[str, str]:
    """The configured device type and precision with "auto" resolved for this machine; the device need not be here."""
    device, precision = config.device, config.precision
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if precision == "auto":
        old = torch.cuda.is_available() and not torch.cuda.is_bf16_supported()
        precision = "bf16" if device == "cuda" and not old else "fp32"
    return device, precision


def teacher_dtype(config: Config, device: str, precision: str) -> torch.dtype:
    """Type in which the teacher is loaded."""
    if config.teacher.dtype != "auto":
        return DTYPES[config.teacher.dtype]
    return torch.bfloat16 if device == "cuda" and precision == "bf16" else torch.float32


def frozen_dtype(config: Config, device: str, precision: str) -> torch.dtype:
    """Type of the frozen weights that are not quantised, once a model is complete: training in fp32 computes in fp32,
    whatever the teacher was loaded in before its layers were quantised."""
    return torch.float32 if precision == "fp32" else teacher_dtype(config, device, precision)


def teacher_config(config: Config) -> PretrainedConfig:
    """The teacher's Hugging Face configuration, from the recipe where that has it, so without network.

    Raises:
        UserError: the configuration contradicts itself.
    """
    fields = dict(config.teacher.config or {})
    if fields:
        try:
            return AutoConfig.for_model(fields.pop("model_type"), **fields)
        except (KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"teacher.config is not usable: {reason}", "leave it out, or correct it") from error
    return AutoConfig.from_pretrained(config.teacher.path, revision=config.teacher.revision)


def meta_student(config: Config) -> HybridModel:
    """The student's shapes without its weights, on the meta device."""
    with torch.device("meta"):
        teacher = AutoModelForCausalLM.from_config(teacher_config(config))
    return HybridModel.from_teacher(teacher, student_spec(config))


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The teacher's tokenizer, see `open_tokenizer`."""
    return open_tokenizer(config.teacher)


def open_tokenizer(teacher: TeacherConfig) -> PreTrainedTokenizerBase:
    """A teacher's tokenizer.

    Raises:
        UserError: there is none, or it needs code of its own that was not allowed.
    """
    try:
        return AutoTokenizer.from_pretrained(
            teacher.path, revision=teacher.revision, trust_remote_code=teacher.trust_remote_code
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"the tokenizer of teacher {teacher.path} cannot be loaded: {reason}",
            "the directory needs a tokenizer.json; teacher.trust_remote_code=true runs code that comes with it",
        ) from error


def stage_structure(config: Config, name: str) -> Structure:
    """What a stage quantises, and the adapters."""
    return Structure.from_fields(config.model_dump(), name)


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
            f"objective calibrate fits the mixers, but {min(fitted)} is quantised",
            "set stages.<name>.quantize of this stage to groups without mixers",
        )
    if stage.objective == "distil" and stage.teacher == "same":
        check_same_weights(changed)
    if stage.objective != "distil":
        return None if changed else "same"
    if stage.teacher == "cache":
        return "cache"
    other = stage.teacher == "separate" or stage.teacher_model.path is not None
    return "separate" if changed or other else "same"
