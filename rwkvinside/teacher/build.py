"""The source of a stage's teacher distributions, built from the configuration."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from ..config.precision import device_and_precision
from ..config.schema import Config, StageConfig
from ..families.registry import find
from ..hybrid.quantized_linear import linear_names, quantize
from ..stages.rows import Rows
from ..training.deepspeed_engine import inference_engine
from ..training.process_group import Distributed
from .load import load_teacher, teacher_of
from .logits_check import check_cache
from .signals import OfflineTeacher, OnlineTeacher, TeacherModel


def separate_teacher(
    config: Config, stage: StageConfig, world: Distributed, dtype: torch.dtype, launched: bool
) -> OnlineTeacher:
    """A frozen model beside the student, quantized and sharded as the stage says.

    Args:
        dtype: of the weights when they are loaded; with precision fp32 those that are not quantized become fp32.
        launched: several processes; without them nothing is sharded.
    """
    own, teacher = stage.teacher_model, teacher_of(config, stage)
    lm = load_teacher(teacher.path, teacher.revision, dtype)
    if own.quantize:
        head = find(lm.config.model_type).head_path
        quantize(lm, linear_names(lm, skip=(head,)), own.quantize, device=world.device)
    if device_and_precision(config)[1] == "fp32":
        lm.float()
    model = TeacherModel(lm)
    if own.shard and launched:
        return OnlineTeacher(*inference_engine(model, list(model.readout.parameters()), world))
    return OnlineTeacher(model.to(world.device))


def cached_teacher(config: Config, name: str, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> OfflineTeacher:
    """The logits that a stage names, checked against the rows that it trains on.

    Raises:
        UserError: not those of this stage, incomplete or damaged; see `check_cache`.
    """
    return OfflineTeacher(check_cache(config, name, tokenizer, rows))
