"""One stage of a run: its data, its phases, and what each of them leaves."""

from __future__ import annotations

import gc
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from .. import __version__
from ..data.batch import Batch
from ..data.sources import tokens_of
from ..errors import UserError
from ..evaluate.in_training import evaluate_student, share
from ..hybrid.document_attention import windows_of
from ..hybrid.model import HybridModel
from ..hybrid.quantized_linear import relative_error
from ..runs.metrics_file import of_kind, read_metrics
from ..stages.param_groups import joined, rate_groups
from ..stages.phases import Phase
from ..stages.plan import StagePlan
from ..stages.rows import Rows, leading_text, report, rows_of, sample, validation_batches
from ..stages.summary import training_table
from ..stages.teacher import build_teacher
from ..support.progress import Progress
from ..support.text import rounded_flop
from ..teacher.kinds import TeacherKind
from ..teacher.signals import Teacher
from ..training.batching import MICRO_TOKENS, rows_within
from ..training.callbacks import Callback, Evaluate, MeasureMFU, SaveExtra, ShowProgress, WriteMetrics
from ..training.checkpoint import Checkpoint
from ..training.deepspeed_engine import Engine
from ..training.frozen_weights import frozen_weights_digest
from ..training.metrics import Console, MetricsWriter
from ..training.precision import precision_context
from ..training.protocols import Step
from ..training.schedule import Schedule
from ..training.trainer import Trainer, TrainingPlan
from .build import (
    check_adapters,
    evaluation_teacher,
    fingerprint,
    layer_settings,
    make_engine,
    make_student,
    numbers,
    save_frozen_weights,
    watch_adapters,
    work_of,
    write_adapters,
)

if TYPE_CHECKING:
    from .run import Run

ROUNDING_TOKENS = 4096  # whose inputs decide how gptq rounds weights


@dataclass(frozen=True)
class _Inputs:
    """What a stage works on.

    Attributes:
        before: the stage that it starts from.
        rows: to train on.
        validation: batches of validation documents.
        data: identity of the training data.
    """

    before: str | None
    rows: Rows
    validation: list[Batch]
    data: str


@dataclass(frozen=True)
class _Models:
    """The student of a phase with its teacher.

    Attributes:
        kind: where the teacher's side comes from.
    """

    student: HybridModel
    kind: TeacherKind | None
    teacher: Teacher | None


def run_stage(run: Run, plan: StagePlan, resume_from: str | None) -> None:
    """Run a stage to its end.

    Args:
        resume_from: checkpoint of the stage to continue from; None: the newest, where there is one.

    Raises:
        UserError: see `train`.
    """
    before, checkpointer = run.stage_before(plan.name), run.checkpointer(plan.name)
    if resume_from and not checkpointer.names():
        raise UserError(f"stage {plan.name} has no checkpoint {resume_from}, nor any other", "use --resume alone")
    checkpoint = checkpointer.load(resume_from) if plan.stage.trains and checkpointer.names() else None
    inputs = _load_inputs(run, plan, before)
    for phase in plan.phases:
        last = phase is plan.phases[-1]
        if checkpoint is None or checkpoint.step < phase.until or last:
            evaluation = _run_phase(run, plan, phase, inputs, checkpoint)
            checkpoint = None if last else checkpointer.load()
    if run.world.is_main:
        if plan.layers.adapters:
            tensors = checkpointer.load().tensors()
            write_adapters(plan.layers, run.shapes, tensors, run.directory.stage(plan.name))
        run.directory.note({}, finished=plan.name, evaluation=evaluation)
    run.world.barrier()


def _load_inputs(run: Run, plan: StagePlan, before: str | None) -> _Inputs:
    """Read the data of a stage, and describe the run in its directory."""
    settings, lm = plan.run, run.shapes.lm.config
    tokens, val = tokens_of(
        settings.data, plan.settings.data, settings.endless_tokens, run.tokenizer, lm.vocab_size, run.world
    )
    run.world.barrier()  # every process has looked at the directory before one writes into it
    rows = rows_of(plan, tokens)
    lines, facts = report(plan, tokens, rows, val)
    if run.world.is_main:
        run.directory.describe(run.config, run.plan_text)
        data = run.directory.conversion().get("data", {}) | {plan.name: facts}
        facts_of_run = {"rwkvinside": __version__, "teacher": settings.teacher.path, "student": fingerprint(run.shapes)}
        run.directory.note(facts_of_run | {"data": data})
        run.loggers.open()
    run.say("\n".join([f"{plan.name}: {lines[0]}", *lines[1:]]))
    return _Inputs(before, rows, validation_batches(val, lm.max_position_embeddings), tokens.fingerprint)


def _run_phase(run: Run, plan: StagePlan, phase: Phase, inputs: _Inputs, checkpoint: Checkpoint | None) -> dict:
    """Run one phase, with a student built for it.

    So a stage that unfreezes takes the same way as a resumed one.

    Returns:
        The last evaluation, {} where there was none.
    """
    gc.collect()  # DeepSpeed's engines are in cycles: the last one, with its model, must go before the next comes
    student = _build_student(run, plan, inputs, checkpoint)
    kind = plan.stage.prepare(student, plan, phase.train)
    if kind is not TeacherKind.SELF:
        student.release_teacher()
    teacher = build_teacher(plan, kind, run.tokenizer, inputs.rows, run.world)
    models = _Models(student, kind, teacher)
    try:
        if plan.stage.trains:
            return _train(run, plan, phase, models, inputs, checkpoint)
        return _fit(run, plan, models, inputs)
    finally:
        if teacher is not None:
            teacher.close()


def _build_student(run: Run, plan: StagePlan, inputs: _Inputs, checkpoint: Checkpoint | None) -> HybridModel:
    """Return the student of a phase.

    Rank 0 writes what it quantizes, the others read it.
    """
    world, folder, before = run.world, run.directory.stage(plan.name), inputs.before
    start = checkpoint or (before and run.checkpointer(before).load())
    if start is not None:
        check_adapters(plan.layers, start.state)
    waits = plan.layers.has_frozen_weights and not world.is_main and frozen_weights_digest(folder) is None
    if waits:
        world.barrier()
    text = partial(leading_text, inputs.rows, ROUNDING_TOKENS)
    earlier = before and run.directory.stage(before)
    student = make_student(plan, start and start.tensors(), folder, world.device, text, earlier)
    if world.is_main:
        save_frozen_weights(student, folder)
    if not waits:
        world.barrier()
    if quantized := student.quantized.values():
        error = relative_error(quantized)
        run.say(f"{plan.name}: quantized weights differ from the original ones by {100 * error:.2g} %")
    return student


def _fit(run: Run, plan: StagePlan, models: _Models, inputs: _Inputs) -> dict:
    """Fit and save on rank 0; the others go on with what it has saved."""
    if not run.world.is_main:
        run.world.barrier()
        return {}
    device, student, teacher = run.world.device, models.student, models.teacher
    metrics, console = MetricsWriter(run.directory.path, run.loggers), Console(plan.name, 1)
    metrics.begin(plan.name)
    student.to(device)
    batches = sample(inputs.rows, plan.length.total_tokens, plan.shape.micro_rows, device)
    tokens = sum(batch.num_tokens for batch in batches)

    def row(kind: str, step: int, values: dict) -> dict:
        place = {"kind": kind, "stage": plan.name, "step": step, "tokens": step * tokens}
        written = place | values | {"time": time.time()}
        metrics.write(written)
        return written

    def evaluate(step: int) -> dict:
        with precision_context(plan.run.precision, device):
            scores = numbers(evaluate_student(student, teacher, inputs.validation, device), teacher)
        console.evaluation(row("eval", step, scores))
        return scores

    evaluate(0)
    progress = Progress(plan.name, len(student.rwkv_layers), unit="layers", stream=sys.stdout)
    with precision_context(plan.run.precision, device), progress:
        fitted = plan.stage.fit(student, batches, lambda layer: progress.advance())
    row(plan.stage.objective, 1, fitted)
    evaluation = evaluate(1)
    if _needs_control(run, models):
        with precision_context(plan.run.precision, device):
            scores = evaluate_student(student, teacher, inputs.validation, device, mode="control")
        console.evaluation(row("control", 1, numbers(scores, teacher)))
    settings = layer_settings(plan.layers, run.directory.stage(plan.name))
    state = {"stage": plan.name, "step": 1, "finished": True, "settings": settings}
    run.checkpointer(plan.name).save(1, student.student_state_dict(), None, state, required=True)
    run.world.barrier()
    return evaluation


def _train(
    run: Run, plan: StagePlan, phase: Phase, models: _Models, inputs: _Inputs, checkpoint: Checkpoint | None
) -> dict:
    student, world = models.student, run.world
    trainable = {n for n, p in student.canonical_parameters().items() if p.requires_grad}
    # an engine of several processes may round or cut what it does not train; one process keeps and saves it
    tensors = student.student_state_dict() if world.is_main else {}
    others = {n: t.to("cpu", copy=world.launched) for n, t in tensors.items() if n not in trainable}
    new_names, groups = joined(student, plan, phase), rate_groups(student, plan, phase)
    run.say("\n".join([f"{plan.name} trains from step {phase.first + 1}:", *training_table(student, plan, phase)]))
    work = work_of(plan, student, models.kind, models.teacher)
    engine = make_engine(plan, phase, student, world)
    try:
        evaluation = _Evaluation(engine, evaluation_teacher(models.teacher), inputs.validation)
        trainer = Trainer(
            engine,
            watch_adapters(_step(plan, models, engine, inputs.rows), student),
            inputs.rows,
            _training_plan(run, plan, plan.schedule(groups), student),
            checkpointer=run.checkpointer(plan.name),
            settings={"seed": plan.run.seed, "data": inputs.data}
            | layer_settings(plan.layers, run.directory.stage(plan.name)),
            callbacks=[Evaluate(evaluation), SaveExtra(others), *_reports(run, plan, work)],
        )
        if checkpoint is not None:
            trainer.restore(checkpoint, joined=new_names if checkpoint.step == phase.first else ())
        trainer.fit(until=phase.until)
        if not evaluation.last and phase.until == plan.length.steps:
            evaluation(phase.until)  # killed between the last checkpoint and the end of the stage
        if phase.until == plan.length.steps and _needs_control(run, models):
            row = {"kind": "control", "stage": plan.name, "step": phase.until, "tokens": plan.length.total_tokens}
            row |= evaluation.numbers("control") | {"time": time.time()}
            if world.is_main:
                MetricsWriter(run.directory.path, run.loggers).write(row)
                Console(plan.name, plan.length.steps).evaluation(row)
    finally:
        engine.close()
    return evaluation.last


def _needs_control(run: Run, models: _Models) -> bool:
    """Return whether this is a windowed student whose control no stage has measured yet, and this one can.

    The control is the teacher cut to the student's windows, so a stage can that has the teacher's attention.
    """
    if models.kind is not TeacherKind.SELF or not windows_of(models.student.mixer_configs):
        return False
    metrics = run.directory.metrics
    return not (metrics.exists() and of_kind(read_metrics(metrics), "control"))


class _Evaluation:
    """Scores of the student on the validation documents, shared by all ranks.

    Attributes:
        last: the numbers of the last evaluation, {} before the first one.
    """

    def __init__(self, engine: Engine, teacher: Teacher | None, batches: list[Batch]):
        self._engine, self._teacher, self._world = engine, teacher, engine.world
        self._batches = share(batches, self._world.rank, self._world.size)
        self.last: dict[str, float] = {}

    def __call__(self, done: int) -> dict[str, float]:
        self.last = self.numbers("student")
        return self.last

    def numbers(self, mode: str) -> dict[str, float]:
        """Return the scores of a mode of the model."""
        world = self._world
        with self._engine.autocast():
            scores = evaluate_student(
                self._engine.module, self._teacher, self._batches, world.device, world.all_reduce_sum, mode
            )
        return numbers(scores, self._teacher)


def _step(plan: StagePlan, models: _Models, engine: Engine, rows: Rows) -> Step[Batch]:
    """Return the step of the stage's objective, once the engine has the student."""
    with engine.autocast():  # without gradients more rows fit than in a step
        micro_rows = rows_within(MICRO_TOKENS, plan.length.seq_len)
        batches = partial(sample, rows, micro_rows=micro_rows, device=engine.world.device)
        step = plan.stage.step(engine.module, models.teacher, plan, batches)
    if plan.settings.activation_checkpointing and plan.stage.recomputes_layers:
        models.student.lm.train().activation_checkpointing_enable()  # transformers recomputes in training mode only
    return step


def _training_plan(run: Run, plan: StagePlan, schedule: Schedule, student: HybridModel) -> TrainingPlan:
    every = plan.settings.evaluate_every_tokens
    return TrainingPlan(
        plan.name,
        plan.length,
        schedule,
        plan.shape.micro_rows,
        evaluate_every=plan.length.steps_for(every) if every else 0,
        save_every=run.config.checkpoint.every_steps,
        labels={"layers": student.rwkv_layers},
    )


def _reports(run: Run, plan: StagePlan, work: float) -> list[Callback]:
    """Return what reports the steps of a stage, on rank 0 alone.

    Args:
        work: operations for a token.
    """
    if not run.world.is_main:
        return []
    peak, origin = run.peak
    run.say(f"{rounded_flop(work)} a token; MFU is of {rounded_flop(peak)}/s ({origin})")
    return [
        MeasureMFU(work, peak),
        WriteMetrics(MetricsWriter(run.directory.path, run.loggers)),
        ShowProgress(Console(plan.name, plan.length.steps, run.config.log_every)),
    ]
