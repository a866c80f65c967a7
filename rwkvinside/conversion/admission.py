"""What is checked before a run writes anything: that it is the run, the teacher and the settings that it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from ..config.schema import Config
from ..data.sources import missing_sources, named_mixture
from ..errors import UserError
from ..runs.directory import Change, RunDirectory
from ..stages.plan import RunPlan, StagePlan
from ..stages.teacher import check_teacher
from ..support.digests import FileDigests
from ..teacher.files import base_identity, check_unchanged
from ..teacher.kinds import TeacherKind
from ..teacher.tokenizer_files import check_tokenizer_code


@dataclass(frozen=True)
class Admission:
    """What the checks have found; empty on all ranks but the first.

    Attributes:
        teacher: `model_identity` of the model that is converted.
        second_teachers: of the models that stages learn from besides, by stage.
        changes: settings that differ from those that the run had, and are accepted.
    """

    teacher: dict[str, str] = field(default_factory=dict)
    second_teachers: dict[str, dict[str, str]] = field(default_factory=dict)
    changes: tuple[Change, ...] = ()


def check_data_named(plan: RunPlan, stages: Sequence[str]) -> None:
    """Refuse stages that name no data, or data that is not there; this needs no tokenizer.

    Raises:
        UserError: names the first of them.
    """
    for one in map(plan.stage, stages):
        named_mixture(plan.settings.data, one.settings.data)
        if missing := missing_sources(plan.settings.data, one.settings.data):
            raise UserError(f"stage {one.name}: data {missing[0]!r} does not exist", "correct the path")


def admit(
    config: Config,
    plan: RunPlan,
    directory: RunDirectory,
    tokenizer: PreTrainedTokenizerBase,
    digests: FileDigests,
    *,
    stage: str | None,
    resume: bool,
    allow_changes: bool,
) -> Admission:
    """Check a run before it begins or goes on; write nothing.

    Args:
        config, plan, directory, tokenizer, digests: of the run.
        stage, resume, allow_changes: see `train`.

    Raises:
        UserError: the directory, the settings, a teacher or data are not what the run needs.
    """
    directory.claim(stage=stage, resume=resume)  # again, now that no other process writes to it
    begun = {name for name in directory.stages() if directory.begun(name)}
    own = begun.union(config.run, plan.selected)  # what the others would have been given changes nothing
    changes = [x for x in directory.changes(config) if not x.key.startswith("stages.") or _is_of(x.key, own)]
    joins = begun if stage is not None and not resume else None
    _check_changes(changes, directory, joins=joins, allowed=allow_changes)
    check_tokenizer_code(plan.settings.teacher)
    unfinished = [plan.stage(name) for name in plan.selected if name not in directory.finished()]
    for one in unfinished:
        if followers := directory.records.followers(one.name):
            raise UserError(
                f"stage {one.name} of {directory.path} is to run, but stage {followers[0]} has begun after it",
                f"restore conversion.json, or remove {directory.stage(followers[0])} to do both again",
            )
    teacher = base_identity(plan.settings.teacher, digests)
    if (identity := directory.records.identity()) is not None:
        check_unchanged(f"teacher {plan.settings.teacher.path}", identity.teacher, teacher)
    for one in unfinished:
        check_teacher(one, tokenizer, digests)
    second = {one.name: base_identity(one.signal_teacher, digests) for one in unfinished if _has_second_teacher(one)}
    for name, current in second.items():
        if (record := directory.records.stage(name)) is not None:
            check_unchanged(f"the teacher_model of stage {name}", record.second_teacher, current)
    return Admission(teacher, second, tuple(changes))


def _check_changes(changes: list[Change], directory: RunDirectory, *, joins: set[str] | None, allowed: bool) -> None:
    """Refuse other settings than those that the run has.

    Args:
        joins: the stages that have begun, where one runs that has not: it brings settings of those that have not.
        allowed: none is refused.
    """
    refused = [x for x in changes if joins is None or not _is_free(x.key, joins)]
    if refused and not allowed:
        raise UserError(
            f"the settings are not those of run {directory.path}: {'; '.join(map(str, refused))}",
            "give the settings that the run has, or accept the new ones with --allow-changes",
        )


def _is_free(key: str, begun: set[str]) -> bool:
    """Return whether a setting says which stages run, or is of a stage that has not begun."""
    return key == "run" or key.startswith("stages.") and not _is_of(key, begun)


def _is_of(key: str, stages: set[str]) -> bool:
    """Return whether a setting is of one of the stages; where a name has dots, also of one that begins with another."""
    return any(key.startswith(f"stages.{name}.") for name in stages)


def _has_second_teacher(plan: StagePlan) -> bool:
    return plan.settings.teacher_model.path is not None and plan.asked_teacher is not TeacherKind.OFFLINE
