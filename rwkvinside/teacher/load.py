"""Load a teacher: its configuration, tokenizer and weights."""

from __future__ import annotations

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..config.schema import Config
from ..config.teacher_lookup import find_teacher
from ..errors import UserError
from ..stages.settings import StageConfig
from .settings import TeacherConfig


def load_teacher(path: str, revision: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """The teacher with its weights, on the CPU, in evaluation mode.

    Args:
        path: local directory or hub id; revision: branch, tag or commit of the hub repository.

    Raises:
        UserError: weights that are missing, damaged, incomplete or not all used.
    """
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, revision=revision, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"the weights of teacher {path} cannot be loaded: {reason}",
            "check the directory or the hub id, the network and your access",
        ) from error
    if problems := {kind: sorted(map(str, names)) for kind, names in info.items() if names}:
        raise UserError(f"the weights of teacher {path} do not fit its configuration: {problems}")
    return model.eval()


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


def teacher_of(config: Config, stage: StageConfig) -> TeacherConfig:
    """The model that the logits of a stage come from: `teacher_model`, or the one that is converted."""
    own = stage.teacher_model
    if own.path is None:
        return config.teacher
    found = find_teacher(own.path, revision=own.revision)
    fields = found.recipe["teacher"]["config"] if found.recipe else None
    return config.teacher.model_copy(update={"path": found.path, "revision": own.revision, "config": fields})
