"""What a stage leaves in the run directory besides its checkpoints: before its first step, and after its last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from .. import __version__
from ..hybrid.fingerprint import fingerprint
from ..hybrid.model import HybridModel
from ..runs.directory import settings_digest
from ..runs.records import StageRecord
from ..stages.plan import StagePlan
from ..support.files import file_digest
from ..training.checkpoint import STATE, best_checkpoint, open_checkpoint, read_score
from ..training.schedule import EarlyEnd
from .build import save_frozen_weights, write_adapters
from .choose import LAYERS

if TYPE_CHECKING:
    from .run import Run


def begin_stage(run: Run, plan: StagePlan, before: str | None, data: Mapping, student: HybridModel) -> None:
    """Write what describes a run and a stage, once all checks have passed; on rank 0.

    Where a stage goes on, nothing changes but settings that the user has changed.

    Args:
        run: of the stage.
        plan: of the stage.
        before: the stage that it starts from.
        data: facts about its data.
        student: at the start of the stage, with what it has quantized.
    """
    directory, records = run.directory, run.directory.records
    if records.identity() is None:
        records.make_identity(run.admission.teacher)
    run.digests.save()
    directory.describe(run.config, run.plan_text, run.forecast.to_dict())
    records.write(
        StageRecord(
            run=run.id,
            stage=plan.name,
            before=before,
            after=records.digest_before(before),
            settings=settings_digest(directory.config()),
            files=save_frozen_weights(student, directory, plan.name),
            second_teacher=run.admission.second_teachers.get(plan.name, {}),
        )
    )
    data = directory.conversion().get("data", {}) | {plan.name: data}
    facts = {"rwkvinside": __version__, "run": run.id, "teacher": plan.run.teacher.path}
    directory.note(facts | {"student": fingerprint(student), "data": data})
    run.loggers.open()


def finish_stage(run: Run, plan: StagePlan, evaluation: Mapping, early_end: EarlyEnd | None) -> None:
    """Write what says that a stage is finished; on rank 0.

    Args:
        run: of the stage.
        plan: of the stage.
        evaluation: its last one, {} if there was none.
        early_end: where and why it ended early; None: it did not.
    """
    directory, records = run.directory, run.directory.records
    folder, record, checkpointer = directory.stage(plan.name), records.stage(plan.name), run.checkpointer(plan.name)
    if record is None:
        raise RuntimeError(f"stage {plan.name} ends without having begun")
    last, best = checkpointer.names()[-1], best_checkpoint(folder)
    if best is not None and best.name == last:
        best = None
    written = [path / STATE for path in (folder / last, best) if path is not None]
    if plan.layers.adapters:
        written += write_adapters(plan.layers, run.shapes_after(plan.name), checkpointer.load(last).tensors(), folder)
    files = {str(path.relative_to(folder)): file_digest(path) for path in written}
    kept = open_checkpoint(folder / last, run.id).state[LAYERS] if plan.stage.chooses_layers else None
    finished = {"checkpoint": last, "best": best and best.name, "attention_layers": kept}
    records.write(replace(record, **finished, files=record.files | files))
    facts = {} if kept is None else {"student": fingerprint(run.shapes_after(plan.name))}
    if early_end is not None:
        end = asdict(early_end) | {"reason": early_end.reason}
        facts["early_ends"] = directory.conversion().get("early_ends", {}) | {plan.name: end}
    directory.note(facts, finished=plan.name, evaluation=evaluation)
    if best is not None and (score := read_score(best)) is not None:
        run.say(
            f"{plan.name}: not the last checkpoint is best on validation data but {best.name} ({score.measure} "
            f"{score.value:.4g}): export and eval take it (export --checkpoint last: the other); "
            f"the next stage starts from the {run.config.checkpoint.continue_from} one (checkpoint.continue_from)"
        )
