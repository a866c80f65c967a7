"""From a configuration to models: the student's specification, the teacher on the meta device or with its weights."""

from __future__ import annotations

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from .config import Config, StageConfig
from .distill.hybrid import HybridModel, StudentSpec
from .distill.teacher import check_same_weights
from .errors import UserError

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
    """Type of the frozen weights in memory."""
    if config.teacher.dtype != "auto":
        return DTYPES[config.teacher.dtype]
    return torch.bfloat16 if device == "cuda" and precision == "bf16" else torch.float32


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
    """The teacher's tokenizer.

    Raises:
        UserError: there is none, or it needs code of its own that was not allowed.
    """
    teacher = config.teacher
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


def mixer_names(model: HybridModel) -> set[str]:
    """Canonical names of all parameters of the mixers."""
    prefix = "model.layers.{}.self_attn.{}"
    return {prefix.format(i, name) for i, mixer in model.mixers.items() for name, _ in mixer.named_parameters()}


def prepare_stage(model: HybridModel, stage: StageConfig) -> str | None:
    """Set what the stage trains and say which exact teacher it has: the student's own frozen weights ("same"), a second
    model ("separate"), or none (None).

    Raises:
        UserError: a pattern that matches nothing; the student's own weights are needed as teacher and were trained.
    """
    model.set_trainable(stage.train)
    mixers = mixer_names(model)
    if stage.objective in ("calibrate", "align") and (others := sorted(model.trained - mixers)):
        raise UserError(
            f"objective {stage.objective} needs the teacher's own weights, but {others[0]} is trained here or before",
            "train mixer groups only, and run this stage before those that train more",
        )
    if stage.objective == "distil" and stage.teacher == "same":
        check_same_weights(model.trained, mixers)
    if model.trained <= mixers and (stage.objective != "distil" or stage.teacher != "separate"):
        return "same"
    return "separate" if stage.objective == "distil" else None
