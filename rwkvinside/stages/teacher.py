"""The teacher's side of a stage, and whether it fits the run.

It is a second model, or its logits on disk.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.encode import tokenizer_hash
from ..errors import UserError
from ..families.registry import find
from ..hybrid.experts import expert_weights, flatten_experts
from ..hybrid.model import HybridModel
from ..hybrid.quantized_linear import linear_names, quantize
from ..support.digests import FileDigests
from ..teacher.files import local_hashes
from ..teacher.kinds import TeacherKind
from ..teacher.load import check_files, load_teacher, meta_teacher, open_tokenizer, teacher_config
from ..teacher.logits_store import LogitsReader, check_identity, row_digests
from ..teacher.signals import OfflineTeacher, OnlineTeacher, SelfTeacher, Teacher, TeacherModel
from ..training.deepspeed_engine import inference_engine
from ..training.process_group import Distributed
from .plan import StagePlan
from .rows import Rows

FIRST_ROWS = 16  # whose contents stand for the data in the identity of a cache; every row is checked when it is used


def build_teacher(
    plan: StagePlan,
    kind: TeacherKind | None,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    world: Distributed,
    digests: FileDigests,
) -> Teacher | None:
    """Return where the teacher's side of a stage comes from.

    Args:
        plan: of the stage.
        kind: from `Stage.prepare`.
        tokenizer, rows: which logits on disk must be of.
        world: the processes that share a sharded model.
        digests: of the teacher's files, as far as they are known.

    Raises:
        UserError: weights cannot be loaded; logits are of something else, incomplete or damaged.
    """
    if kind is TeacherKind.SELF:
        return SelfTeacher()
    if kind is TeacherKind.OFFLINE:
        return OfflineTeacher(check_cache(plan, tokenizer, digests, rows))
    return online_teacher(plan, world) if kind is TeacherKind.ONLINE else None


def online_teacher(plan: StagePlan, world: Distributed) -> OnlineTeacher:
    """Return a frozen model next to the student.

    Quantized and sharded as the stage says. In fp32, weights that are not quantized become fp32, whatever they were
    loaded in. One process shards nothing.
    """
    second, teacher = plan.settings.teacher_model, plan.signal_teacher
    lm = load_teacher(teacher.path, teacher.revision, plan.run.teacher_dtype, fused=plan.run.fused)
    family = find(lm.config.model_type)
    if second.quantize:
        flatten_experts(lm, expert_weights(lm))
        quantize(lm, linear_names(lm, skip=(family.head_path,)), second.quantize, device=world.device)
    if plan.run.precision == "fp32":
        lm.float()
    model = TeacherModel(lm)
    if second.shard and world.launched:
        return OnlineTeacher(*inference_engine(model, list(family.head(lm).parameters()), world))
    return OnlineTeacher(model.to(world.device))


def original_teacher(plan: StagePlan, world: Distributed) -> OnlineTeacher:
    """Return the `online_teacher` of a stage as it was before anything was quantized."""
    second = plan.settings.teacher_model.model_copy(update={"quantize": None})
    settings = plan.settings.model_copy(update={"teacher_model": second})
    return online_teacher(replace(plan, settings=settings), world)


def teacher_label(plan: StagePlan, student: HybridModel, kind: TeacherKind | None) -> str | None:
    """Return what evaluations of a stage compare with, where that is not the original of the model converted.

    Args:
        plan: of the stage.
        student: with its quantized layers, some of which the student as its own teacher runs on.
        kind: where the teacher's side comes from.
    """
    formats = teacher_formats(plan, student, kind)
    other = plan.settings.teacher_model.path if kind is TeacherKind.ONLINE else None
    return ", ".join(filter(None, (other, f"quantized ({', '.join(formats)})" if formats else None))) or None


def teacher_formats(plan: StagePlan, student: HybridModel, kind: TeacherKind | None) -> list[str]:
    """Return in which formats the teacher of a stage is quantized.

    Where there are any, the last numbers of the stage are against the original. Arguments are those of `teacher_label`.
    """
    if kind is TeacherKind.ONLINE:
        return list(filter(None, [plan.settings.teacher_model.quantize]))
    mixers = student.mixer_names()
    formats = {layer.format for name, layer in student.quantized.items() if f"{name}.weight" not in mixers}
    return sorted(formats) if kind is TeacherKind.SELF else []


def meta_online_teacher(plan: StagePlan) -> PreTrainedModel:
    """Return the shapes of `online_teacher`'s model, on the meta device."""
    lm = meta_teacher(plan.signal_teacher)
    if (number_format := plan.settings.teacher_model.quantize) is not None:
        flatten_experts(lm, expert_weights(lm))
        quantize(lm, linear_names(lm, skip=(find(lm.config.model_type).head_path,)), number_format)
    return lm


def check_teacher(plan: StagePlan, tokenizer: PreTrainedTokenizerBase, digests: FileDigests) -> None:
    """Refuse, before anything trains, a teacher that a stage cannot use.

    Args: see `check_cache`.

    Raises:
        UserError: a second model of another tokenizer, whose distributions would be over other tokens; see also
            `check_cache`.
    """
    if plan.asked_teacher is TeacherKind.OFFLINE:
        check_cache(plan, tokenizer, digests)
    elif plan.settings.teacher_model.path is not None:
        check_model(plan, tokenizer)


def check_model(plan: StagePlan, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a second model that is not computed right or damaged, or for which a token of the run has another id.

    Raises:
        UserError: see `teacher.load.check_files` and `check_tokenizer`.
    """
    check_files(plan.signal_teacher)
    check_tokenizer(plan, tokenizer)


def check_tokenizer(plan: StagePlan, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a teacher for which a token of the run has another id.

    Raises:
        UserError: names the token. The teacher may know more, such as the tokens of a later chat template.
    """
    teacher_ids = open_tokenizer(plan.signal_teacher).get_vocab()
    different = [(id, token) for token, id in tokenizer.get_vocab().items() if teacher_ids.get(token) != id]
    if different:
        id, token = min(different)
        raise UserError(
            f"teacher_model {plan.signal_teacher.path} has another tokenizer than {plan.run.teacher.path}: "
            f"token {token!r} is {teacher_ids.get(token, 'unknown')} there, {id} here",
            "use a teacher of the same family",
        )


def check_cache(
    plan: StagePlan, tokenizer: PreTrainedTokenizerBase, digests: FileDigests, rows: Rows | None = None
) -> LogitsReader:
    """Return logits on disk that are what a stage needs.

    Args:
        plan: of the stage.
        tokenizer: of the run.
        digests: of the teacher's files, as far as they are known.
        rows: of the stage; None: they are not known yet, and only the rest is checked.

    Raises:
        UserError: the cache differs from the stage in teacher, tokenizer, temperature, data or order of rows; it has
            too few rows, or too few tokens of each position; files are missing.
    """
    if plan.settings.teacher_cache is None:
        raise RuntimeError(f"stage {plan.name} has no teacher_cache")
    reader, identity = LogitsReader(plan.settings.teacher_cache), cache_identity(plan, tokenizer, digests)
    # the teacher by its files, or by its name where they were left on another machine
    for name in ("teacher", "teacher's configuration") if identity["teacher"] is None else ("teacher's name",):
        del identity[name]
    if "teacher's configuration" not in reader.identity:  # written by an earlier version
        identity.pop("teacher's configuration", None)
    if rows is not None:
        identity["data"] = data_hash(rows)
    check_identity(reader.path, reader.identity, reader.identity | identity)
    reader.require(min(plan.row_count, reader.rows))  # the rest of other logits would be of no use
    if plan.row_count > reader.rows:
        step = f"stages.{plan.name}.batch.tokens={plan.length.batch_tokens}"
        raise UserError(
            f"the logits in {reader.path} are of {reader.rows:,} rows, and the steps of stage {plan.name} read "
            f"{plan.row_count:,}: {plan.length.steps:,} of {plan.length.rows_per_step:,}",
            f"add the missing rows: the same `rwkvinside data logits` with stages.{plan.name}.tokens="
            f"{plan.length.total_tokens} {step}",
        )
    top_k = plan.loss.top_k
    if top_k and top_k > reader.k:
        raise UserError(
            f"the logits in {reader.path} have {reader.k} tokens a position, and stages.{plan.name}.loss.top_k is "
            f"{top_k}",
            "lower top_k, or write them again with a larger --k",
        )
    return reader


def cache_identity(plan: StagePlan, tokenizer: PreTrainedTokenizerBase, digests: FileDigests) -> dict:
    """Return what logits on disk are of, except for the data.

    Names that a message can use, and JSON values. Arguments are those of `check_cache`.
    """
    teacher = plan.signal_teacher
    weights, configuration = local_hashes(teacher.path, teacher.revision, digests)
    return {
        "row length": plan.length.seq_len,
        "stage": plan.name,
        "seed": plan.run.seed,
        "tokenizer": tokenizer_hash(tokenizer)[:16],
        "teacher": weights,
        "teacher's configuration": configuration,
        "teacher's name": teacher.path if teacher.revision is None else f"{teacher.path}@{teacher.revision}",
        "teacher's quantization": plan.settings.teacher_model.quantize,
        "temperature": plan.loss.temperature,
        "vocabulary": shared_vocab(plan),
    }


def shared_vocab(plan: StagePlan) -> int:
    """Return how many ids student and teacher share.

    The larger vocabulary is cut.
    """
    return min(teacher_config(plan.run.teacher).vocab_size, teacher_config(plan.signal_teacher).vocab_size)


def data_hash(rows: Rows) -> str:
    """Return a hash of the tokens and labels of the first rows."""
    digests = row_digests(rows.batch(range(FIRST_ROWS)))
    return hashlib.sha256(digests.numpy().tobytes()).hexdigest()[:16]
