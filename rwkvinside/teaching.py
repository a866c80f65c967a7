"""The teacher that a distillation stage names: a second model, or its logits on disk, and that it fits the run."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

from .config import Config, StageConfig, TeacherConfig
from .data import tokenizer_hash
from .data.logits import LogitsReader, check_identity, row_digests
from .distill.teacher import CachedLogits, SeparateTeacher, TeacherModel, load_teacher
from .errors import UserError
from .models import device_and_precision, open_tokenizer, teacher_config
from .quantization import linear_names, quantize
from .sources import Rows
from .teachers import find_teacher
from .training.engine import inference_engine
from .training.world import World

FIRST_ROWS = 16  # whose contents stand for the data in the identity of a cache; every row is checked when it is used


def teacher_of(config: Config, stage: StageConfig) -> TeacherConfig:
    """The model that the logits of a stage come from: `teacher_model`, or the one that is converted."""
    own = stage.teacher_model
    if own.path is None:
        return config.teacher
    found = find_teacher(own.path, revision=own.revision)
    fields = found.recipe["teacher"]["config"] if found.recipe else None
    return config.teacher.model_copy(update={"path": found.path, "revision": own.revision, "config": fields})


def check_teacher(config: Config, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse, before anything trains, what a distillation stage names as its teacher and cannot use.

    Raises:
        UserError: a second model of another tokenizer, whose distributions would be over other tokens; see also
            `check_cache`.
    """
    stage = config.stages[name]
    if stage.teacher == "cache":
        check_cache(config, name, tokenizer)
    elif stage.teacher_model.path is not None:
        check_tokenizer(config, stage, tokenizer)


def check_tokenizer(config: Config, stage: StageConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Every token of the run must have the same id for the stage's teacher, else `UserError`."""
    teacher = teacher_of(config, stage)
    theirs = open_tokenizer(teacher).get_vocab()
    # it may know more, such as the tokens of a later chat template
    wrong = [(id, token) for token, id in tokenizer.get_vocab().items() if theirs.get(token) != id]
    if wrong:
        id, token = min(wrong)
        raise UserError(
            f"teacher_model {teacher.path} has another tokenizer than {config.teacher.path}: "
            f"token {token!r} is {theirs.get(token, 'unknown')} there, {id} here",
            "use a teacher of the same family",
        )


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


def check_cache(
    config: Config, name: str, tokenizer: PreTrainedTokenizerBase, rows: Rows | None = None
) -> LogitsReader:
    """A cache that is what a stage needs.

    Args:
        rows: of the stage; None: they are not there yet, and what can be said without them must do.

    Raises:
        UserError: what the cache is of differs from the stage in teacher, tokenizer, temperature, data or order of
            rows; then too few rows, or tokens of each position; files that are missing.
    """
    stage = config.stages[name]
    reader, wanted = LogitsReader(stage.teacher_cache), cache_identity(config, name, tokenizer)
    # by its weights, or by its name where it was left on another machine
    wanted.pop("teacher" if wanted["teacher"] is None else "teacher's name")
    if rows is not None:
        wanted["data"] = data_hash(rows)
    check_identity(reader.path, reader.identity, reader.identity | wanted)
    reader.require(stage.steps * stage.rows)  # the rest of other logits would be of no use
    if stage.loss.top_k and stage.loss.top_k > reader.k:
        raise UserError(
            f"the logits in {reader.path} have {reader.k} tokens a position, and stages.{name}.loss.top_k is "
            f"{stage.loss.top_k}",
            "lower top_k, or write them again with a larger --k",
        )
    return reader


def cache_identity(config: Config, name: str, tokenizer: PreTrainedTokenizerBase) -> dict:
    """What logits on disk are of, but for the data itself: names that a message can use, and JSON values."""
    stage = config.stages[name]
    teacher = teacher_of(config, stage)
    return {
        "row length": stage.data.seq_len,
        "stage": name,
        "seed": config.seed,
        "tokenizer": tokenizer_hash(tokenizer)[:16],
        "teacher": weights_hash(teacher.path, teacher.revision),
        "teacher's name": teacher.path if teacher.revision is None else f"{teacher.path}@{teacher.revision}",
        "teacher's quantisation": stage.teacher_model.quantize,
        "temperature": stage.loss.temperature,
        "vocabulary": shared_vocab(config, stage),
    }


def shared_vocab(config: Config, stage: StageConfig) -> int:
    """Ids that student and teacher share; the larger vocabulary is cut."""
    teacher = config.model_copy(update={"teacher": teacher_of(config, stage)})
    return min(teacher_config(config).vocab_size, teacher_config(teacher).vocab_size)


def data_hash(rows: Rows) -> str:
    """Of the tokens and labels of the first rows."""
    digests = row_digests(rows.batch(range(FIRST_ROWS)))
    return hashlib.sha256(digests.numpy().tobytes()).hexdigest()[:16]


@cache
def weights_hash(path: str, revision: str | None) -> str | None:
    """Of a model's weights, wherever and under whatever name its files lie; None: they are not on this machine."""
    folder = Path(path)
    if not folder.is_dir():
        try:
            folder = Path(cached_file(path, "config.json", revision=revision, local_files_only=True)).parent
        except OSError:
            return None
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    digests = []
    for file in files:
        with file.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return hashlib.sha256(" ".join(sorted(digests)).encode()).hexdigest()[:16] if files else None
