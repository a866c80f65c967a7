"""One stage of a run: its data, its phases, and what each of them leaves."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from ..data.batch import Batch
from ..data.sources import tokens_of
from ..errors import UserError
from ..evaluate.in_training import continuation, evaluate_student, judging, share
from ..hybrid.document_attention import windows_of
from ..hybrid.model import HybridModel
from ..hybrid.quantized_linear import relative_error
from ..hybrid.row_states import RowStates
from ..runs.metrics_file import of_kind, read_metrics
from ..stages.param_groups import joined, rate_groups
from ..stages.phases import Phase
from ..stages.plan import StagePlan
from ..stages.rows import Rows, judged_streams, leading_text, report, rows_of, sample, validation_batches
from ..stages.steps import StatefulStep
from ..stages.summary import training_table
from ..stages.teacher import build_teacher, teacher_formats, teacher_label
from ..support.progress import Progress
from ..support.text import rounded_flop, spans
from ..teacher.kinds import TeacherKind
from ..teacher.signals import Teacher
from ..training.batching import MICRO_TOKENS, rows_within
from ..training.callbacks import (
    Callback,
    Evaluate,
    MeasureMFU,
    SaveExtra,
    ShowProgress,
    WatchValidation,
    WriteMetrics,
    WriteSamples,
)
from ..training.checkpoint import Checkpoint, checkpoint_directories, read_score
from ..training.deepspeed_engine import Engine
from ..training.metrics import Console, MetricsWriter, Score
from ..training.precision import precision_context
from ..training.process_group import Distributed
from ..training.protocols import Step
from ..training.schedule import EarlyEnd, Schedule
from ..training.trainer import Trainer, TrainingPlan, check_resumable
from .build import (
    check_adapters,
    evaluation_teacher,
    frozen_digest,
    make_engine,
    make_student,
    numbers,
    original_for,
    read_frozen,
    stage_settings,
    watch_adapters,
    work_of,
)
from .choose import LAYERS, choose_layers, held_out
from .recording import begin_stage, finish_stage

if TYPE_CHECKING:
    from .run import Run

SAMPLED_TOKENS = 16  # of a validation document, that a sample begins with
ROUNDING_TOKENS = 4096  # whose inputs decide how gptq rounds weights


@dataclass(frozen=True)
class _Inputs:
    """What a stage works on.

    Attributes:
        before: the stage that it starts from.
        rows: to train on.
        validation: batches of validation documents.
        data: identity of the training data.
        facts: about the data, for conversion.json.
    """

    before: str | None
    rows: Rows
    validation: list[Batch]
    data: str
    facts: dict


@dataclass(frozen=True)
class _Models:
    """The student of a phase with its teacher.

    Attributes:
        kind: where the teacher's side comes from.
    """

    student: HybridModel
    kind: TeacherKind | None
    teacher: Teacher | None


@dataclass(frozen=True)
class _Result:
    """What a phase ends with, besides its checkpoint.

    Attributes:
        evaluation: the last one, {} where there was none.
        early_end: where and why it ended the stage early; None: it did not.
    """

    evaluation: dict
    early_end: EarlyEnd | None = None


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
    if run.directory.begun(plan.name):
        at = f"after step {checkpoint.step} of {plan.length.steps}, from {checkpoint.path}" if checkpoint else ""
        run.say(f"{plan.name} goes on {at or 'from its beginning: it has saved no step'}")
    inputs = _load_inputs(run, plan, before)
    if checkpoint is not None:
        check_resumable(checkpoint, plan.name, _settings(run, plan, inputs), plan.length)
    for phase in plan.phases:
        last = phase is plan.phases[-1]
        if checkpoint is None or checkpoint.step < phase.until or last:
            result = _run_phase(run, plan, phase, inputs, checkpoint)
            checkpoint = None if last else run.checkpointer(plan.name).load()
    run.world.on_main(lambda: finish_stage(run, plan, result.evaluation, result.early_end))


def _load_inputs(run: Run, plan: StagePlan, before: str | None) -> _Inputs:
    """Read the data of a stage."""
    settings, lm = plan.run, run.shapes.lm.config
    tokens, val = tokens_of(
        settings.data, plan.settings.data, settings.endless_tokens, run.tokenizer, lm.vocab_size, run.world
    )
    run.world.barrier()  # every process has looked at the directory before one writes into it
    rows = rows_of(plan, tokens)
    lines, facts = report(plan, tokens, rows, val)
    run.say("\n".join([f"{plan.name}: {lines[0]}", *lines[1:]]))
    return _Inputs(before, rows, validation_batches(plan, val, lm.max_position_embeddings), tokens.fingerprint, facts)


def _settings(run: Run, plan: StagePlan, inputs: _Inputs) -> dict:
    """Return what a checkpoint of a stage must share with it, as JSON values."""
    shared = {"seed": plan.run.seed, "data": inputs.data} | stage_settings(plan, run.directory)
    return shared | ({"stateful": True} if plan.settings.stateful else {})


def _run_phase(run: Run, plan: StagePlan, phase: Phase, inputs: _Inputs, checkpoint: Checkpoint | None) -> _Result:
    """Run one phase, with a student built for it.

    So a stage that unfreezes takes the same way as a resumed one.
    """
    gc.collect()  # DeepSpeed's engines are in cycles: the last one, with its model, must go before the next comes
    student = _build_student(run, plan, inputs, checkpoint)
    kind = plan.stage.prepare(student, plan, phase.train)
    if kind is not TeacherKind.SELF:
        student.release_teacher()
    teacher = build_teacher(plan, kind, run.tokenizer, inputs.rows, run.world, run.digests)
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

    Rank 0 writes what it quantizes, the others read it. Nothing of a stage is written before its student is there.
    """
    world, directory, before = run.world, run.directory, inputs.before
    start = checkpoint or (before and run.load_result(before))
    if start:
        check_adapters(plan.layers, start.state)
    waits = plan.layers.has_frozen_weights and not world.is_main and frozen_digest(directory, plan.name) is None

    def begin() -> None:
        begin_stage(run, plan, before, inputs.facts, student)

    if waits:
        world.on_main(begin)
    text = partial(leading_text, inputs.rows, ROUNDING_TOKENS)
    frozen, earlier = read_frozen(directory, plan.name), before and read_frozen(directory, before)
    student = make_student(plan, start and start.tensors(), frozen, world.device, text, earlier)
    if not waits:
        world.on_main(begin)
    if quantized := student.quantized.values():
        error = relative_error(quantized)
        run.say(f"{plan.name}: quantized weights differ from the original ones by {100 * error:.2g} %")
    return student


def _fit(run: Run, plan: StagePlan, models: _Models, inputs: _Inputs) -> _Result:
    """Fit and save on rank 0; the others go on with what it has saved, and take their share of short distillations."""
    device, student = run.world.device, models.student
    if not run.world.is_main:
        if plan.trials:
            batches = held_out(inputs.validation, plan.length.total_tokens, device)
            with precision_context(plan.run.precision, device):
                _choose(run, plan, student.to(device), batches)
        run.world.barrier()
        return _Result({})
    judge = partial(_judge, run, plan, models, alone=True)
    metrics, console = MetricsWriter(run.directory.path, run.loggers), Console(plan.name, 1)
    metrics.begin(plan.name)
    student.to(device)
    if plan.stage.chooses_layers:
        batches = held_out(inputs.validation, plan.length.total_tokens, device)
    else:
        batches = sample(inputs.rows, plan.length.total_tokens, plan.shape.micro_rows, device)
    tokens = sum(batch.num_tokens for batch in batches)

    def row(kind: str, step: int, values: dict) -> dict:
        place = {"kind": kind, "stage": plan.name, "step": step, "tokens": step * tokens}
        written = place | values | {"time": time.time()}
        metrics.write(written)
        return written

    def evaluate(step: int, mode: str = "student") -> dict:
        batches = inputs.validation
        with precision_context(plan.run.precision, device), judge(final=step == 1) as (against, label):
            with console.part(step, "evaluating", len(batches), "batches") as progress:
                scores = evaluate_student(student, against, batches, device, mode=mode, progress=progress.advance)
            scores = numbers(scores, against) | label
        console.evaluation(row("eval" if mode == "student" else mode, step, scores))
        return scores

    evaluate(0)
    with precision_context(plan.run.precision, device):
        fitted = (_choose if plan.stage.chooses_layers else _calibrate)(run, plan, student, batches)
    row(plan.stage.objective, 1, fitted)
    evaluation = evaluate(1)
    if _needs_control(run, models):
        evaluate(1, "control")
    settings = stage_settings(plan, run.directory)
    state = {"stage": plan.name, "step": 1, "finished": True, "settings": settings}
    state |= {LAYERS: list(student.spec.attention_layers)} if plan.stage.chooses_layers else {}
    score = Score.of(1, evaluation)
    run.checkpointer(plan.name, student).save(1, student.student_state_dict(), None, state, required=True, score=score)
    run.world.barrier()
    return _Result(evaluation)


def _calibrate(run: Run, plan: StagePlan, student: HybridModel, batches: list[Batch]) -> dict:
    """Fit the mixers and return the row of metrics.jsonl."""
    with Progress(plan.name, student.lm.config.num_hidden_layers, unit="layers", stream=sys.stdout) as progress:
        return plan.stage.fit(student, batches, progress)


def _choose(run: Run, plan: StagePlan, student: HybridModel, batches: list[Batch]) -> dict:
    """Give the chosen layers their attention back, and return the row of metrics.jsonl."""
    before, choice = run.stage_before(plan.name), plan.run.choice
    if before is None or choice is None:
        raise RuntimeError(f"stage {plan.name} has no student, or nothing, to choose from")
    of_student = run.directory, before, student
    world = run.world if plan.trials else Distributed(run.world.device)
    kept, scores = choose_layers(*of_student, batches, choice, run.tokenizer, plan.trials, world, run.say)
    run.say(f"{plan.name}: layers {spans(kept)} keep their attention, by {choice.method}")
    student.keep_attention(kept)
    return {"kept": list(kept), "scores": {str(i): score for i, score in enumerate(scores.layers)}}


def _train(
    run: Run, plan: StagePlan, phase: Phase, models: _Models, inputs: _Inputs, checkpoint: Checkpoint | None
) -> _Result:
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
        judge = partial(_judge, run, plan, models)
        states = RowStates(student, plan.length.rows_per_step) if plan.settings.stateful else None
        step = watch_adapters(_step(plan, models, engine, inputs.rows), student)
        judged_states = partial(RowStates, student, judged_streams(plan)) if states is not None else lambda: None
        console = Console(plan.name, plan.length.steps, run.config.log_every) if world.is_main else None
        evaluation = _Evaluation(engine, judge, inputs.validation, plan.length.steps, judged_states, console)
        trainer = Trainer(
            engine,
            step if states is None else StatefulStep(step, states),
            inputs.rows,
            _training_plan(run, plan, phase, plan.schedule(groups), student),
            checkpointer=run.checkpointer(plan.name),
            settings=_settings(run, plan, inputs),
            carried=states,
            callbacks=[
                Evaluate(evaluation),
                SaveExtra(others),
                *_reports(run, plan, console, inputs.before, work),
                *_samples(run, plan, models, inputs, engine, console),
            ],
        )
        if checkpoint is not None:
            trainer.restore(checkpoint, joined=new_names if checkpoint.step == phase.first else ())
        trainer.fit(until=phase.until)
        if not evaluation.last and trainer.finished:
            evaluation(trainer.done)  # killed between the last checkpoint and the end of the stage
        if trainer.finished and _needs_control(run, models):
            row = {"kind": "control", "stage": plan.name, "step": trainer.done, "tokens": trainer.tokens}
            row |= evaluation.numbers("control", trainer.done) | {"time": time.time()}
            if console is not None:
                MetricsWriter(run.directory.path, run.loggers).write(row)
                console.evaluation(row)
    finally:
        engine.close()
    return _Result(evaluation.last, trainer.early_end)


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

    Args:
        judge: gives the teacher to compare with, see `_judge`.
        steps: after which the numbers are the last ones.
        states: makes what rows begin with that go on from batch to batch; None where they begin anew.
        console: shows how far an evaluation is; None: nothing does, as on all ranks but 0.

    Attributes:
        last: the numbers of the last evaluation, {} before the first one.
    """

    def __init__(
        self,
        engine: Engine,
        judge: Callable[..., AbstractContextManager[tuple[Teacher | None, dict]]],
        batches: list[Batch],
        steps: int,
        states: Callable[[], RowStates | None],
        console: Console | None,
    ):
        self._states, self._console = states, console
        self._engine, self._judge, self._world, self._steps = engine, judge, engine.world, steps
        self._batches = share(batches, self._world.rank, self._world.size)
        self.last: dict = {}

    def __call__(self, done: int) -> dict:
        self.last = self.numbers("student", done)
        return self.last

    def numbers(self, mode: str, done: int) -> dict:
        """Return the scores of a mode of the model after so many steps."""
        world, batches = self._world, self._batches
        judge = self._judge(final=done == self._steps)
        shown = _shown(self._console, done, "evaluating", len(batches), "batches")
        with self._engine.autocast(), judge as (teacher, label), shown as advance:
            models = self._engine.module, teacher
            reads = batches, world.device, world.all_reduce_sum, mode, self._states()
            scores = evaluate_student(*models, *reads, progress=advance)
        return numbers(scores, teacher) | label


@contextmanager
def _shown(console: Console | None, done: int, what: str, total: int, unit: str) -> Iterator[Callable[[], object]]:
    """Show how far the work of the block is, where there is a console; yield what advances it.

    Arguments are those of `Console.part`.
    """
    if console is None:
        yield lambda: None
        return
    with console.part(done, what, total, unit) as progress:
        yield progress.advance


@contextmanager
def _judge(
    run: Run, plan: StagePlan, models: _Models, *, final: bool, alone: bool = False
) -> Iterator[tuple[Teacher | None, dict]]:
    """Yield the teacher that an evaluation compares with, and {"teacher": what it is} where it is not the original.

    The last numbers of a stage are against the original, where a quantized teacher stood in for it before.

    Args:
        run, plan, models: of the stage.
        final: these are the last numbers.
        alone: the other ranks wait.
    """
    teacher = evaluation_teacher(models.teacher)
    sources = (plan, models.student, models.kind)
    label = teacher_label(*sources) if teacher is not None else None
    world = Distributed(run.world.device) if alone else run.world
    original = original_for(plan, teacher_formats(*sources), world, run.say) if final else None
    if original is None:
        yield teacher, {"teacher": label} if label else {}
        return
    try:
        second = plan.settings.teacher_model.path
        yield original, {"teacher": second} if second else {}
    finally:
        original.close()


def _step(plan: StagePlan, models: _Models, engine: Engine, rows: Rows) -> Step[Batch]:
    """Return the step of the stage's objective, once the engine has the student."""
    with engine.autocast():  # without gradients more rows fit than in a step
        micro_rows = rows_within(MICRO_TOKENS, plan.length.seq_len)
        batches = partial(sample, rows, micro_rows=micro_rows, device=engine.world.device)
        step = plan.stage.step(engine.module, models.teacher, plan, batches)
    models.student.recompute(plan.stage.recomputed(plan.settings))
    return step


def _training_plan(run: Run, plan: StagePlan, phase: Phase, schedule: Schedule, student: HybridModel) -> TrainingPlan:
    every = plan.settings.evaluate_every_tokens
    return TrainingPlan(
        plan.name,
        plan.length,
        schedule,
        plan.shape.micro_rows,
        evaluate_every=plan.length.steps_for(every) if every else 0,
        save_every=run.config.checkpoint.every_steps,
        early_stop=plan.settings.early_stop if phase is plan.phases[-1] else None,  # what joins later is to train first
        labels={"layers": student.rwkv_layers},
    )


def _reports(run: Run, plan: StagePlan, console: Console | None, before: str | None, work: float) -> list[Callback]:
    """Return what reports the steps of a stage, on rank 0 alone.

    Args:
        console: of rank 0.
        before: the stage that it starts from.
        work: operations for a token.
    """
    if console is None:
        return []
    peak, origin = run.peak
    run.say(f"{rounded_flop(work)} a token; MFU is of {rounded_flop(peak)}/s ({origin})")
    return [
        MeasureMFU(work, peak),
        WriteMetrics(MetricsWriter(run.directory.path, run.loggers)),
        ShowProgress(console, _later(run, plan, work)),
        WatchValidation(_scores(run, plan.name, before)),
    ]


def _later(run: Run, plan: StagePlan, work: float) -> float:
    """Return how many steps of a stage need as many operations as all stages that run after it."""
    after = run.forecast.work_after(plan.name, run.directory.finished())
    return after / (work * plan.length.tokens_per_step) if work else 0.0


def _samples(
    run: Run, plan: StagePlan, models: _Models, inputs: _Inputs, engine: Engine, console: Console | None
) -> list[Callback]:
    """Return what lets the student write now and then, and at the end of the run beside its teacher."""
    settings, every = run.config.samples, run.config.samples.every_tokens
    starts = [run.tokenizer(text)["input_ids"] for text in settings.prompts] or _beginnings(inputs.validation)
    last = plan.name == run.plan.selected[-1]
    if not settings.tokens or not starts or not (every or last):
        return []
    end, device = {run.tokenizer.eos_token_id}, engine.world.device

    def text(ids: list[int]) -> str:
        return run.tokenizer.decode(ids, skip_special_tokens=True)

    def write(done: int) -> list[dict[str, str]]:
        teacher = evaluation_teacher(models.teacher)
        writers = {"student": None} | ({} if teacher is None else {"teacher": teacher})
        shown = _shown(console, done, "writing", len(starts) * len(writers) * settings.tokens, "tokens")
        found = []
        with judging(engine.module), engine.autocast(), shown as advance:
            for ids in starts:
                sample = {"prompt": text(ids)}
                for name, writer in writers.items():
                    whole = ids + continuation(engine.module, writer, ids, settings.tokens, end, device, advance)
                    sample[name] = text(whole)[len(sample["prompt"]) :]
                found.append(sample)
        return found

    return [WriteSamples(write, plan.length.steps_for(every) if every else 0, last)]


def _beginnings(validation: list[Batch]) -> list[list[int]]:
    """Return the beginning of the first validation document, as the one beginning of a sample."""
    for batch in validation[:1]:
        real = int((batch.segment_ids[0] > 0).sum())
        return [batch.input_ids[0, : max(1, min(SAMPLED_TOKENS, real // 2))].tolist()]
    return []


def _scores(run: Run, stage: str, before: str | None) -> list[Score]:
    """Return the scores of the checkpoints of a stage; that of its start is of step 0."""
    found = [read_score(path) for path in checkpoint_directories(run.directory.stage(stage))]
    start = before and run.result(before)
    if start and (score := read_score(start)) is not None:
        found.append(replace(score, step=0))
    return [score for score in found if score is not None]
