"""Whether a teacher, or its logits on disk, fit the run that names them."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

from ..config.schema import Config, StageConfig
from ..data.encode import tokenizer_hash
from ..errors import UserError
from ..stages.rows import Rows
from ..support.files import file_digest
from .load import open_tokenizer, teacher_config, teacher_of
from .logits_store import LogitsReader, check_identity, row_digests

FIRST_ROWS = 16  # whose contents stand for the data in the identity of a cache; every row is checked when it is used


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
        "teacher's quantization": stage.teacher_model.quantize,
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
    digests = sorted(map(file_digest, files))
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()[:16] if files else None
