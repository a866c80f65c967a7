"""Load a teacher: its configuration, tokenizer and weights."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from ..errors import UserError
from ..support.files import file_digest
from .settings import TeacherConfig


def load_teacher(path: str, revision: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """Return a teacher with its weights, on the CPU, in evaluation mode.

    Args:
        path: local directory or hub id.
        revision: branch, tag or commit of the hub repository.
        dtype: to load the weights in.

    Raises:
        UserError: weights that are missing, damaged, incomplete or not all used.
    """
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, revision=revision, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"the weights of teacher {path} cannot be loaded: {_one_line(error)}",
            "check the directory or the hub id, the network and your access",
        ) from error
    if problems := {kind: sorted(map(str, names)) for kind, names in info.items() if names}:
        raise UserError(f"the weights of teacher {path} do not fit its configuration: {problems}")
    return model.eval()


def teacher_config(teacher: TeacherConfig) -> PretrainedConfig:
    """Return a teacher's Hugging Face configuration.

    Where the teacher's preset has it, no network is needed.

    Raises:
        UserError: the configuration contradicts itself.
    """
    fields = dict(teacher.config or {})
    if fields:
        try:
            return AutoConfig.for_model(fields.pop("model_type"), **fields)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"teacher.config is not usable: {_one_line(error)}", "correct it or leave it out"
            ) from error
    return AutoConfig.from_pretrained(teacher.path, revision=teacher.revision)


def open_tokenizer(teacher: TeacherConfig) -> PreTrainedTokenizerBase:
    """Return a teacher's tokenizer.

    Raises:
        UserError: there is none, or it comes with code that was not allowed.
    """
    try:
        return AutoTokenizer.from_pretrained(
            teacher.path, revision=teacher.revision, trust_remote_code=teacher.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"the tokenizer of teacher {teacher.path} cannot be loaded: {_one_line(error)}",
            "the directory needs a tokenizer.json; teacher.trust_remote_code=true runs code that comes with it",
        ) from error


def meta_teacher(teacher: TeacherConfig) -> PreTrainedModel:
    """Return a teacher without its weights, on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(teacher_config(teacher))


@cache
def weights_hash(path: str, revision: str | None) -> str | None:
    """Return a hash of a model's weights, whatever its files are called.

    None: they are not on this machine.
    """
    folder = Path(path)
    if not folder.is_dir():
        try:
            folder = Path(cached_file(path, "config.json", revision=revision, local_files_only=True)).parent
        except OSError:
            return None
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    digests = sorted(map(file_digest, files))
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()[:16] if files else None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
