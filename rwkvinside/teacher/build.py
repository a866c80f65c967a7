"""The source of a stage's teacher distributions, built from the configuration."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from ..config.precision import device_and_precision
from ..config.schema import Config, StageConfig
from ..hybrid.quantized_linear import linear_names, quantize
from ..stages.rows import Rows
from ..training.deepspeed_engine import inference_engine
from ..training.process_group import World
from .load import load_teacher, teacher_of
from .logits_check import check_cache
from .signals import CachedLogits, SeparateTeacher, TeacherModel


def separate_teacher(
    config: Config, stage: StageConfig, world: World, dtype: torch.dtype, launched: bool
) -> SeparateTeacher:
    """A frozen model beside the student, quantised and sharded as the stage says.

    Args:
        dtype: of the weights when they are loaded; with precision fp32 those that are not quantised become fp32.
        launched: several processes; without them nothing is sharded.
    """
    own, teacher = stage.teacher_model, teacher_of(config, stage)
    lm = load_teacher(teacher.path, teacher.revision, dtype)
    if own.quantize:
        quantize(lm, linear_names(lm, skip=("lm_head",)), own.quantize, device=world.device)
    if device_and_precision(config)[1] == "fp32":
        lm.float()
    model = TeacherModel(lm)
    if own.shard and launched:
        return SeparateTeacher(*inference_engine(model, list(model.readout.parameters()), world))
    return SeparateTeacher(model.to(world.device))


def cached_teacher(config: Config, name: str, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> CachedLogits:
    """The logits that a stage names, checked against the rows that it trains on.

    Raises:
        UserError: not those of this stage, incomplete or damaged; see `check_cache`.
    """
    return CachedLogits(check_cache(config, name, tokenizer, rows))
