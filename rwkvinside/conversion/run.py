"""The composition root: a configuration becomes student, data, engine and trainer, stage after stage.

Every stage is built anew from the teacher and the last checkpoint of the stage before it, so that a run in one go, one
stage at a time and a resumed one take the same way.
"""

from __future__ import annotations

import gc
import sys
import time
import warnings
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from .. import __version__
from ..config.precision import device_and_precision, teacher_dtype
from ..config.schema import Config
from ..data.batch import Batch
from ..data.sources import missing_sources, tokens_of
from ..errors import UserError
from ..evaluate.in_training import evaluate_student, share
from ..hybrid.calibration import calibrate, teacher_norms
from ..hybrid.model import HybridModel
from ..hybrid.quantized_linear import relative_error
from ..modeling.wkv7 import why_unavailable
from ..planning.devices import peak_flops
from ..planning.plan import plan_text, stage_order
from ..planning.training_table import training_table
from ..runs.directory import RunDirectory
from ..stages.param_groups import joined
from ..stages.phases import Phase, phases
from ..stages.prepare import meta_student, prepare_stage, stage_layers
from ..stages.rows import Rows, leading_text, report, rows_of, sample, validation_batches
from ..support.process_memory import return_freed_memory
from ..support.progress import Progress
from ..support.text import rounded_flop
from ..teacher.load import load_tokenizer
from ..teacher.logits_check import check_teacher
from ..teacher.signals import Teacher
from ..training.batching import MICRO_TOKENS, micro_rows
from ..training.callbacks import Evaluate, MeasureMFU, SaveExtra, ShowProgress, WriteMetrics
from ..training.checkpoint import Checkpoint, Checkpointer
from ..training.deepspeed_engine import join_process_group
from ..training.frozen_weights import frozen_weights_digest
from ..training.loggers import Loggers
from ..training.metrics import Console, MetricsWriter
from ..training.precision import precision_context
from ..training.process_group import Distributed
from ..training.schedule import StageLength
from ..training.trainer import Trainer, TrainingPlan
from .build import (
    check_adapters,
    evaluation_teacher,
    fingerprint,
    make_engine,
    make_schedule,
    make_step,
    make_student,
    make_teacher,
    numbers,
    save_frozen_weights,
    structure_settings,
    work_of,
    write_adapters,
)

POWER_TOKENS = 16384  # from which the weights of the alignment loss are measured
ROUNDING_TOKENS = 4096  # whose inputs decide how weights are rounded, where they do


def train(
    config: Config,
    *,
    stage: str | None = None,
    resume: bool = False,
    resume_from: str | None = None,
    launched: bool = False,
) -> None:
    """Run the stages of a conversion that are not finished, or one of them.

    Args:
        config: from `load_config`.
        stage: run this one alone, from what the stage before it left.
        resume: continue in a run directory that is not empty.
        resume_from: checkpoint of the first unfinished stage to continue from; None is the newest.
        launched: this process is one of those that `deepspeed` or `torchrun` started.

    Raises:
        UserError: whatever is wrong with the input; `Interrupted` after SIGTERM or SIGINT, with the work saved.
    """
    if stage is not None and stage not in config.stages:
        raise UserError(f"there is no stage {stage!r}", f"stages: {', '.join(config.stages)}")
    directory = RunDirectory(config.out)
    directory.claim(stage=stage, resume=resume or resume_from is not None)
    device, precision = device_and_precision(config)
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but PyTorch finds no CUDA device", "use device=cpu, or see rwkvinside doctor")
    if not sys.stderr.isatty():
        disable_progress_bar()  # of transformers, for the loading of weights
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # norms are meant to stay fp32 in bf16
    plan_text(config, [stage] if stage else None)  # what is wrong with the student shows before anything is loaded
    shapes = meta_student(config)
    return_freed_memory(sum(p.numel() for p in shapes.parameters()))
    backend = config.student.backend
    if backend != "auto" and (reason := why_unavailable(backend, device, torch.float32, shapes.mixer_config.head_size)):
        raise UserError(f"student.backend {backend} cannot run: {reason}", "use student.backend=auto")
    world = join_process_group() if launched else Distributed(device)
    loggers = Loggers(config.loggers if world.is_main else (), directory.path, config.model_dump(mode="json"))
    try:
        plan = plan_text(config, [stage] if stage else None, ranks=world.size)
        run = _Run(config, directory, world, precision, launched, load_tokenizer(config), shapes, plan, loggers)
        run.say(plan)
        names = [stage] if stage else config.run
        for name in names:  # what a later stage lacks shows now, not after days
            if name not in directory.finished():
                if missing := missing_sources(config, config.stages[name]):
                    raise UserError(f"stage {name}: data {missing[0]!r} does not exist", "correct the path")
                check_teacher(config, name, run.tokenizer)
        for name in names:
            if name in directory.finished():
                run.say(f"{name} is finished already")
            else:
                _run_stage(run, name, resume_from)
                resume_from = None
    finally:
        loggers.close()
        world.close()


@dataclass(frozen=True)
class _Run:
    """What all stages of a run share; `shapes` is the student on the meta device."""

    config: Config
    directory: RunDirectory
    world: Distributed
    precision: str
    launched: bool
    tokenizer: PreTrainedTokenizerBase
    shapes: HybridModel
    plan: str
    loggers: Loggers

    @property
    def dtype(self) -> torch.dtype:
        return teacher_dtype(self.config, self.world.device.type, self.precision)

    @cached_property
    def peak(self) -> tuple[float, str]:
        """Operations that the devices of all ranks can do in a second, and where the number is from."""
        one, origin = peak_flops(self.world.device, self.precision)
        return one * self.world.size, origin

    def say(self, line: str) -> None:
        if self.world.is_main:
            Console("run", 1).say(line)

    def checkpointer(self, name: str) -> Checkpointer:
        settings, student = self.config.checkpoint, fingerprint(self.shapes)
        return Checkpointer(self.directory.stage(name), student, settings.keep, settings.on_disk_full)


def _run_stage(run: _Run, name: str, resume_from: str | None) -> None:
    config, world = run.config, run.world
    stage, before = config.stages[name], _stage_before(run, name)
    lm = run.shapes.lm.config
    checkpointer = run.checkpointer(name)
    trains = stage.objective != "calibrate"
    if resume_from and not checkpointer.names():
        raise UserError(f"stage {name} has no checkpoint {resume_from}, nor any other", "use --resume alone")
    checkpoint = checkpointer.load(resume_from) if trains and checkpointer.names() else None
    tokens, val = tokens_of(config, stage, run.tokenizer, lm.vocab_size, world)
    world.barrier()  # every process has looked at the directory before one writes into it
    if world.is_main:
        run.directory.describe(config, run.plan)
        facts = {"rwkvinside": __version__, "teacher": config.teacher.path, "student": fingerprint(run.shapes)}
        run.directory.note(facts)
        run.loggers.open()
    rows = rows_of(config, name, tokens)
    lines, read = report(stage, tokens, rows, val)
    if world.is_main:
        run.directory.note({"data": run.directory.conversion().get("data", {}) | {name: read}})
    run.say("\n".join([f"{name}: {lines[0]}", *lines[1:]]))
    given = _Given(rows, validation_batches(val, lm.max_position_embeddings), tokens.fingerprint)
    *_, last = parts = phases(stage)
    for phase in parts:
        if checkpoint is None or checkpoint.step < phase.until or phase is last:
            evaluation = _run_phase(run, name, phase, given, checkpoint, before)
            checkpoint = None if phase is last else checkpointer.load()
    if world.is_main:
        if stage_layers(config, name).adapters:
            write_adapters(config, name, run.shapes, checkpointer.load().tensors(), run.directory.stage(name))
        run.directory.note({}, finished=name, evaluation=evaluation)
    world.barrier()


@dataclass(frozen=True)
class _Given:
    """What a stage works on.

    Args:
        rows: to train on.
        judged: batches of validation documents.
        data: identity of the training data.
    """

    rows: Rows
    judged: list[Batch]
    data: str


def _run_phase(
    run: _Run, name: str, phase: Phase, given: _Given, checkpoint: Checkpoint | None, before: str | None
) -> dict:
    """One phase of a stage, with a student built for it, so that a stage that unfreezes goes the way of a resumed one.

    Returns:
        The last evaluation, {} where there was none.
    """
    gc.collect()  # DeepSpeed's engines are in cycles: the last one, with its model, must go before the next comes
    config, world = run.config, run.world
    stage, folder = config.stages[name], run.directory.stage(name)
    start = checkpoint or (before and run.checkpointer(before).load())
    if start is not None:
        check_adapters(config, name, start.state)

    # the first process writes what it quantizes, the others read it
    has_frozen = stage_layers(config, name).has_frozen_weights
    reads = has_frozen and not world.is_main and frozen_weights_digest(folder) is None
    if reads:
        world.barrier()
    text = partial(leading_text, given.rows, ROUNDING_TOKENS)
    earlier = before and run.directory.stage(before)
    student = make_student(config, name, run.dtype, start and start.tensors(), folder, world.device, text, earlier)
    if world.is_main:
        save_frozen_weights(student, folder)
    if not reads:
        world.barrier()
    if quantized := student.quantized.values():
        run.say(f"{name}: quantized weights differ from the original ones by {100 * relative_error(quantized):.2g} %")
    source = prepare_stage(student, stage, phase.train)
    teacher = make_teacher(config, name, source, student, given.rows, run.tokenizer, world, run.dtype, run.launched)
    try:
        if stage.objective == "calibrate":
            return _calibrate(run, name, student, teacher, given)
        return _train(run, name, phase, student, teacher, given, checkpoint)
    finally:
        if teacher is not None:
            teacher.close()


def _stage_before(run: _Run, name: str) -> str | None:
    """The stage whose result this one starts from: the one before it in `run`, or the last that was run."""
    order, finished = stage_order(run.config, [name]), run.directory.finished()
    if order.index(name) == 0:
        return None
    before = order[order.index(name) - 1] if name in run.config.run else (finished or [order[-2]])[-1]
    if before not in finished:
        raise UserError(
            f"stage {name} starts from stage {before}, which is not finished in {run.directory.path}",
            f"run {before} first, or leave it out with run=[...]",
        )
    return before


def _calibrate(run: _Run, name: str, student: HybridModel, teacher: Teacher | None, given: _Given) -> dict:
    """Fit and save on the first process; the others go on with what it has saved."""
    stage, device = run.config.stages[name], run.world.device
    metrics, console = MetricsWriter(run.directory.path, run.loggers), Console(name, 1)
    if run.world.is_main:
        metrics.begin(name)
        student.to(device)
        batches = sample(given.rows, stage.tokens, micro_rows(stage, 1), device)
        tokens = sum(batch.num_tokens for batch in batches)

        def evaluate(step: int) -> dict:
            with precision_context(run.precision, device):
                found = numbers(evaluate_student(student, teacher, given.judged, device), teacher)
            row = {"kind": "eval", "stage": name, "step": step, "tokens": step * tokens, **found, "time": time.time()}
            metrics.write(row)
            console.evaluation(row)
            return found

        evaluate(0)
        progress = Progress(name, len(student.rwkv_layers), unit="layers", stream=sys.stdout)
        with precision_context(run.precision, device), progress:
            fits = calibrate(student, batches, lambda layer: progress.advance())
        row = {"kind": "calibrate", "stage": name, "step": 1, "tokens": tokens, "time": time.time()}
        fields = ("error", "error_before", "half_life", "rate", "scale", "bonus")
        metrics.write(row | {field: {str(i): getattr(fit, field) for i, fit in fits.items()} for field in fields})
        found = evaluate(1)
        state = {"stage": name, "step": 1, "finished": True}
        state["settings"] = structure_settings(run.config, name, run.directory.stage(name))
        run.checkpointer(name).save(1, student.student_state_dict(), None, state, required=True)
    run.world.barrier()
    return found if run.world.is_main else {}


def _train(
    run: _Run,
    name: str,
    phase: Phase,
    student: HybridModel,
    teacher: Teacher | None,
    given: _Given,
    checkpoint: Checkpoint | None,
) -> dict:
    config, world = run.config, run.world
    stage = config.stages[name]
    trainable = {n for n, p in student.canonical_parameters().items() if p.requires_grad}
    # an engine of several processes may round or cut what it does not train; one process keeps and saves it
    kept = student.student_state_dict() if world.is_main else {}
    others = {n: t.to("cpu", copy=run.launched) for n, t in kept.items() if n not in trainable}
    new = joined(student, stage, phase)
    schedule = make_schedule(stage, phase, student)
    run.say("\n".join([f"{name} trains from step {phase.first + 1}:", *training_table(student, stage, phase)]))
    work = work_of(stage, student, teacher)
    if world.is_main:
        peak, origin = run.peak
        run.say(f"{rounded_flop(work)} a token; MFU is of {rounded_flop(peak)}/s ({origin})")
    length = StageLength(stage.tokens, stage.batch.tokens, stage.data.seq_len)
    own = share(given.judged, world.rank, world.size)
    last: dict = {}

    def evaluate(done: int) -> dict:
        with engine.autocast():
            scores = evaluate_student(
                engine.module, evaluation_teacher(teacher), own, world.device, world.all_reduce_sum
            )
        last.update(numbers(scores, evaluation_teacher(teacher)))
        return dict(last)

    engine = make_engine(config, stage, phase, student, world, run.precision, run.launched)
    try:
        power = None
        if stage.objective == "align":
            with engine.autocast():
                together = max(1, MICRO_TOKENS // stage.data.seq_len)  # without gradients more rows fit than in a step
                batches = sample(given.rows, POWER_TOKENS, together, world.device)
                power, _ = teacher_norms(engine.module, batches)
        plan = TrainingPlan(
            name,
            length,
            schedule,
            micro_rows(stage, world.size),
            evaluate_every=length.steps_for(stage.evaluate_every_tokens) if stage.evaluate_every_tokens else 0,
            save_every=config.checkpoint.every_steps,
            labels={"layers": student.rwkv_layers},
        )
        callbacks = [Evaluate(evaluate), SaveExtra(others)]
        if world.is_main:
            callbacks += [
                MeasureMFU(work, peak),
                WriteMetrics(MetricsWriter(run.directory.path, run.loggers)),
                ShowProgress(Console(name, length.steps, config.log_every)),
            ]
        trainer = Trainer(
            engine,
            make_step(stage, student, teacher, power),
            given.rows,
            plan,
            checkpointer=run.checkpointer(name),
            settings={"seed": config.seed, "data": given.data}
            | structure_settings(config, name, run.directory.stage(name)),
            callbacks=callbacks,
        )
        if checkpoint is not None:
            trainer.restore(checkpoint, joined=new if checkpoint.step == phase.first else ())
        trainer.fit(until=phase.until)
        if not last and phase.until == length.steps:  # killed between the last checkpoint and the end of the stage
            evaluate(phase.until)
    finally:
        engine.close()
    return last
