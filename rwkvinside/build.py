"""The composition root: a configuration becomes student, data, engine and trainer, stage after stage.

Every stage is built anew from the teacher and the last checkpoint of the stage before it, so that a run in one go, one
stage at a time and a resumed one take the same way.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from . import __version__
from .config import Config
from .data import Batch
from .distill.calibrate import calibrate, teacher_power
from .distill.hybrid import HybridModel
from .errors import UserError
from .modeling.wkv7 import refusal
from .models import device_and_precision, load_tokenizer, meta_student, prepare_stage, teacher_dtype
from .plan import micro_rows, plan_text, stage_order
from .rundir import RunDirectory
from .sources import judged_batches, rows_of, sample, tokens_of
from .stage import fingerprint, make_engine, make_evaluate, make_schedule, make_step, make_student, make_teacher
from .training.checkpoint import Checkpointer
from .training.engine import launched_world
from .training.metrics import Console, MetricsWriter
from .training.schedule import Budget
from .training.trainer import Trainer
from .training.world import World

POWER_TOKENS = 16384  # from which the weights of the alignment loss are measured


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
    plan_text(config, [stage] if stage else None)  # what is wrong with the student shows before anything is loaded
    if (backend := config.student.backend) != "auto":
        head_size = meta_student(config).mixer_config.head_size
        if reason := refusal(backend, device, torch.float32, head_size):
            raise UserError(f"student.backend {backend} cannot run: {reason}", "use student.backend=auto")
    world = launched_world() if launched else World(device)
    try:
        plan = plan_text(config, [stage] if stage else None, ranks=world.size)
        run = _Run(config, directory, world, precision, launched, load_tokenizer(config), plan)
        run.say(plan)
        for name in [stage] if stage else config.run:
            if name in directory.finished():
                run.say(f"{name} is finished already")
            else:
                _run_stage(run, name, resume_from)
                resume_from = None
    finally:
        world.close()


@dataclass(frozen=True)
class _Run:
    """What all stages of a run share."""

    config: Config
    directory: RunDirectory
    world: World
    precision: str
    launched: bool
    tokenizer: PreTrainedTokenizerBase
    plan: str

    @property
    def dtype(self) -> torch.dtype:
        return teacher_dtype(self.config, self.world.device.type, self.precision)

    def say(self, line: str) -> None:
        if self.world.is_main:
            Console("run", 1).say(line)

    def autocast(self) -> AbstractContextManager:
        """The context of the stage's precision, for what runs outside of an engine."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16)

    def checkpointer(self, name: str, student: dict) -> Checkpointer:
        settings = self.config.checkpoint
        return Checkpointer(self.directory.stage(name), student, settings.keep, settings.on_disk_full)


def _run_stage(run: _Run, name: str, resume_from: str | None) -> None:
    config, world = run.config, run.world
    stage = config.stages[name]
    before = _stage_before(run, name)
    student = make_student(config, run.dtype, before and _tensors_of(run, before))
    source = prepare_stage(student, stage)
    vocab = student.lm.config.vocab_size
    tokens, val = tokens_of(config, stage, run.tokenizer, vocab, world)
    world.barrier()  # every process has looked at the directory before one writes into it
    if world.is_main:
        run.directory.describe(config, run.plan)
        run.directory.note({"rwkvinside": __version__, "teacher": config.teacher.path, "student": fingerprint(student)})
    run.say(
        f"{name}: {tokens.num_tokens:,} tokens of {tokens.num_documents:,} documents, {val.num_tokens:,} to validate"
    )

    teacher = make_teacher(config, source, student, world, run.dtype)
    judged = judged_batches(val, student.lm.config.max_position_embeddings, vocab)
    evaluate = make_evaluate(student, teacher, judged, run.autocast)
    rows = rows_of(config, name, tokens)
    student.to(world.device)
    if stage.objective == "calibrate":
        batches = sample(rows, stage.tokens, micro_rows(stage, 1), world.device)
        evaluation = _calibrate(run, name, student, batches, evaluate)
    else:
        power = None
        if stage.objective == "align":
            with run.autocast():
                power, _ = teacher_power(student, sample(rows, POWER_TOKENS, micro_rows(stage, 1), world.device))
        step = make_step(stage, student, teacher, power)
        evaluation = _train(run, name, student, step, rows, evaluate, {"data": tokens.fingerprint}, resume_from)
    if world.is_main:
        run.directory.note({}, finished=name, evaluation=evaluation)
    world.barrier()


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


def _tensors_of(run: _Run, stage: str) -> dict[str, torch.Tensor]:
    return run.checkpointer(stage, fingerprint(meta_student(run.config))).load().tensors()


def _calibrate(run: _Run, name: str, student: HybridModel, batches: list[Batch], evaluate: Callable[[], dict]) -> dict:
    """Fit and save on the first process; the others go on with what it has saved."""
    if not run.world.is_main:
        return {}
    metrics, console = MetricsWriter(run.directory.path), Console(name, 1)
    metrics.begin(name)
    tokens = sum(batch.num_tokens for batch in batches)

    def judge(step: int) -> dict:
        found = evaluate()
        row = {"kind": "eval", "stage": name, "step": step, "tokens": step * tokens, **found, "time": time.time()}
        metrics.write(row)
        console.evaluation(row)
        return found

    judge(0)
    with run.autocast():
        fits = calibrate(student, batches)
    row = {"kind": "calibrate", "stage": name, "step": 1, "tokens": tokens, "time": time.time()}
    fields = ("error", "error_before", "half_life", "rate", "scale", "bonus")
    metrics.write(row | {field: {str(i): getattr(fit, field) for i, fit in fits.items()} for field in fields})
    found = judge(1)
    state = {"stage": name, "step": 1, "finished": True}
    run.checkpointer(name, fingerprint(student)).save(1, student.student_state_dict(), None, state, required=True)
    return found


def _train(run, name, student, step, rows, evaluate, data, resume_from) -> dict:
    """Train to the end of the stage; returns its last evaluation, {} where it had been made before."""
    config, world = run.config, run.world
    stage = config.stages[name]
    trainable = {n for group in student.trainable_groups().values() for n in group}
    # copies, because an engine may round what it does not train
    others = {n: t.to("cpu", copy=True) for n, t in student.student_state_dict().items() if n not in trainable}
    budget = Budget(stage.tokens, stage.batch.tokens, stage.data.seq_len)
    last: dict = {}

    def judge(done: int) -> dict:
        if world.is_main:
            last.clear()
            last.update(evaluate())
        return dict(last)

    checkpointer = run.checkpointer(name, fingerprint(student))
    engine = make_engine(config, stage, student, world, run.precision, run.launched)
    try:
        trainer = Trainer(
            engine,
            step,
            rows,
            stage=name,
            budget=budget,
            schedule=make_schedule(stage, student),
            micro_rows=micro_rows(stage, world.size),
            checkpointer=checkpointer,
            settings={"seed": config.seed} | data,
            metrics=MetricsWriter(run.directory.path),
            console=Console(name, budget.steps, config.log_every),
            evaluate=judge,
            evaluate_every=budget.steps_for(stage.evaluate_every_tokens) if stage.evaluate_every_tokens else 0,
            save_every=config.checkpoint.every_steps,
            other_tensors=lambda: others,
            labels={"layers": student.rwkv_layers},
        )
        if checkpointer.names():
            trainer.restore(checkpointer.load(resume_from))
        trainer.fit()
    finally:
        engine.close()
    return last
