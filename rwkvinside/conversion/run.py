"""A run: stage after stage from a configuration, into a run directory.

Every stage is built anew from the teacher and the last checkpoint of the stage before it, so that a run in one go, one
stage at a time and a resumed one take the same way.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ..config.resolve import resolve, with_steps
from ..config.schema import Config, check_config
from ..data.sources import close, tokens_of
from ..errors import CONTINUE, Interrupted, UserError
from ..hybrid.fingerprint import fingerprint
from ..hybrid.model import HybridModel
from ..modeling.wkv7 import why_unavailable
from ..planning.devices import peak_flops
from ..planning.fitting import resolve_fitted
from ..planning.forecast import Forecast, expected_rate, forecast, forecast_text
from ..planning.plan import meta_student, plan_text
from ..runs.directory import DIGESTS, PLAN, RunDirectory
from ..stages.plan import RunPlan, RunSettings, StagePlan
from ..stages.rows import check_targets
from ..support.digests import FileDigests
from ..support.lock import locked
from ..support.process_memory import return_freed_memory
from ..support.quiet import quiet_libraries
from ..teacher.load import check_files, open_tokenizer
from ..training.checkpoint import Checkpoint, Checkpointer, checkpoint_directories
from ..training.deepspeed_engine import join_process_group
from ..training.loggers import Loggers
from ..training.metrics import Console
from ..training.process_group import Distributed
from ..training.stop_signal import sigterm_interrupts
from .admission import Admission, admit, check_data_named
from .stage import run_stage


@dataclass(frozen=True)
class Run:
    """What all stages of a run share.

    Attributes:
        config: with the steps that it has on these processes, for config.yaml, trackers and messages.
        plan: what follows from it.
        plan_text: the plan for people.
        forecast: the plan in numbers.
        directory: where everything goes.
        world: the processes.
        tokenizer: the teacher's.
        shapes: the student on the meta device.
        loggers: trackers in addition to metrics.jsonl.
        digests: of the teacher's files; other ranks find what rank 0 has saved when the run began.
        admission: what the checks before the run have found.
    """

    config: Config
    plan: RunPlan
    plan_text: str
    forecast: Forecast
    directory: RunDirectory
    world: Distributed
    tokenizer: PreTrainedTokenizerBase
    shapes: HybridModel
    loggers: Loggers
    digests: FileDigests
    admission: Admission

    @property
    def id(self) -> str:
        """The run's own id, once it has begun."""
        identity = self.directory.records.identity()
        if identity is None:
            raise RuntimeError(f"run {self.directory.path} has not begun")
        return identity.run

    @cached_property
    def peak(self) -> tuple[float, str]:
        """Operations of all ranks' devices in a second, and the source of the number."""
        of_device, origin = peak_flops(self.world.device, self.plan.settings.precision)
        return of_device * self.world.size, origin

    def say(self, line: str) -> None:
        """Print a line, on rank 0."""
        if self.world.is_main:
            Console("run", 1).say(line)

    def shapes_after(self, stage: str) -> HybridModel:
        """Return the student that a stage leaves, on the meta device; of one that is to choose layers, without them."""
        if self.plan.settings.choice is None:
            return self.shapes
        kept = self.directory.records.kept_layers(stage)
        if kept == self.shapes.spec.attention_layers:
            return self.shapes
        run = next((plan.run for plan in self.plan.stages if plan.name == stage), self.plan.settings)
        student = run.student if kept is None else run.student.model_copy(update={"attention_layers": kept})
        return meta_student(replace(run, student=student))

    def checkpointer(self, stage: str, student: HybridModel | None = None) -> Checkpointer:
        """Return what writes and reads the checkpoints of a stage.

        Args:
            stage: its name.
            student: to be written; None: what the stage leaves according to the plan and the run's records.
        """
        settings, identity = self.config.checkpoint, self.directory.records.identity()
        found = fingerprint(student or self.shapes_after(stage))
        run = identity and identity.run
        return Checkpointer(self.directory.stage(stage), found, settings.keep, settings.on_disk_full, run)

    def with_choice(self) -> Run:
        """Return the run that goes on with the layers that it has chosen."""
        kept = self.directory.records.chosen_layers()
        done = self.directory.finished()
        world = {"ranks": self.world.size, "launched": self.world.launched}
        plan = resolve_fitted(self.config, self.plan.selected, kept=kept, done=done, **world)
        return replace(self, plan=plan, plan_text=plan_text(plan, self.config), shapes=meta_student(plan.settings))

    def result(self, stage: str) -> Path | None:
        """Return the checkpoint of a finished stage that the next one starts from.

        Raises:
            UserError: it is not there as the stage has left it.
        """
        return self.directory.checkpoint(stage, self.config.checkpoint.continue_from)

    def load_result(self, stage: str) -> Checkpoint:
        """Return the content of `result`; raises what that does."""
        found = self.result(stage)
        return self.checkpointer(stage).load(found and found.name)

    def stage_before(self, name: str) -> str | None:
        """Return the stage whose result a stage starts from.

        It is the one it began with; else the one before it in `run`, or the last that was run.

        Raises:
            UserError: it is not finished.
        """
        if (record := self.directory.records.stage(name)) is not None:
            return record.before
        order, finished = [stage.name for stage in self.plan.stages], self.directory.finished()
        if order.index(name) == 0:
            return None
        planned = order[order.index(name) - 1]
        before = planned if name in self.config.run else (finished or [planned])[-1]
        if before not in finished:
            raise UserError(
                f"stage {name} starts from stage {before}, which is not finished in {self.directory.path}",
                f"run {before} first, or leave it out with run=[...]",
            )
        return before


@sigterm_interrupts()
def train(
    config: Config,
    *,
    stage: str | None = None,
    resume: bool = False,
    resume_from: str | None = None,
    allow_changes: bool = False,
    launched: bool = False,
) -> None:
    """Run the unfinished stages of a conversion, or one of them, in `config.out`.

        config = rw.load_config(teacher="Qwen3-0.6B", data=["train.jsonl"], out="run")
        rw.train(config)

    Args:
        config: from `load_config`.
        stage: run this one alone, from what the stage before it left.
        resume: continue in a run directory that is not empty.
        resume_from: checkpoint of the first unfinished stage to continue from; None is the newest.
        allow_changes: go on with other settings than those that the run has had so far.
        launched: this process is one of those that `deepspeed` or `torchrun` started.

    Raises:
        UserError: whatever is wrong with the input; `Interrupted` after SIGTERM or SIGINT, with the work saved.
    """
    check_config(config)
    directory = RunDirectory(config.out)
    try:
        _train(config, directory, stage, resume or resume_from is not None, resume_from, allow_changes, launched)
    except KeyboardInterrupt as error:  # other than in a step, which is finished and saved
        if any(map(checkpoint_directories, directory.path.glob("stages/*"))):
            raise Interrupted(f"stopped; what was saved before is in {directory.path}", CONTINUE) from error
        raise


def _train(
    config: Config,
    directory: RunDirectory,
    stage: str | None,
    resume: bool,
    resume_from: str | None,
    allow_changes: bool,
    launched: bool,
) -> None:
    """Check everything, then run the stages; arguments are those of `train`."""
    selected = None if stage is None else [stage]
    directory.claim(stage=stage, resume=resume)
    kept = directory.records.chosen_layers() if config.student.layer_choice else None
    plan = resolve(config, selected, kept=kept, launched=launched)
    check_files(config.teacher)
    _check_device(plan.settings.device)
    quiet_libraries()
    plan_text(plan, config)  # what is wrong with the student shows before anything is loaded
    shapes = meta_student(plan.settings)
    return_freed_memory(sum(p.numel() for p in shapes.parameters()))
    _check_backend(config.student.backend, plan.settings.device, shapes)
    world = join_process_group() if launched else Distributed(plan.settings.device)
    with ExitStack() as stack:
        stack.callback(world.close)
        world.on_main(lambda: stack.enter_context(locked(directory.path)))
        done = directory.finished()
        running = [name for name in plan.selected if name not in done]
        world.on_main(lambda: check_data_named(plan, running))
        config = with_steps(config, running, world.size, directory.step_tokens(config))
        loggers = Loggers(config.loggers if world.is_main else (), directory.path, config.model_dump(mode="json"))
        stack.callback(loggers.close)
        plan = resolve_fitted(config, selected, world.size, kept, done, launched=world.launched)
        text, tokenizer = plan_text(plan, config), open_tokenizer(config.teacher)
        digests = FileDigests(directory.path / DIGESTS)
        asked = {"stage": stage, "resume": resume, "allow_changes": allow_changes}
        admission = world.on_main(lambda: admit(config, plan, directory, tokenizer, digests, **asked)) or Admission()
        run = Run(
            config, plan, text, forecast(plan, config), directory, world, tokenizer, shapes, loggers, digests, admission
        )
        _run(run, resume_from)


def _run(run: Run, resume_from: str | None) -> None:
    """Run the unfinished stages."""
    run.say(forecast_text(run.forecast, expected_rate(run.forecast)).rstrip())
    run.say(f"details   {run.directory.path / PLAN}")
    run.say(f"kernels   {kernels_of(run.plan.settings, run.shapes)}")
    for change in run.admission.changes:
        run.say(f"changed   {change}")
    finished = run.directory.finished()
    for name in (name for name in run.plan.selected if name in finished):
        run.say(f"{name} is finished already")
    unfinished = [name for name in run.plan.selected if name not in finished]
    if not unfinished and resume_from is not None:
        raise UserError(f"all stages of {run.directory.path} are finished", "leave out --resume-from")
    if not unfinished:
        run.say(f"nothing is left to do in {run.directory.path}")
    for name in unfinished:
        _check_data(run, run.plan.stage(name))
    for name in unfinished:
        run_stage(run, run.plan.stage(name), resume_from)
        resume_from = None
        if run.plan.stage(name).stage.chooses_layers:
            run = run.with_choice()


def _check_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but PyTorch finds no CUDA device", "use device=cpu, or see rwkvinside doctor")


def _check_backend(backend: str, device: str, shapes: HybridModel) -> None:
    if backend == "auto":
        return
    for head_size in {mixer.head_size for mixer in shapes.mixer_configs.values()}:
        if reason := why_unavailable(backend, device, torch.float32, head_size):
            raise UserError(f"student.backend {backend} cannot run: {reason}", "use student.backend=auto")


def kernels_of(settings: RunSettings, shapes: HybridModel) -> str:
    """Return who runs the recurrence in training, for Triton in which precision mode (docs/wkv7.md), and the norms."""
    layers = "; norms and MLPs: Liger Kernel" if settings.fused.layers else ""
    return _recurrence_of(settings, shapes) + layers


def _recurrence_of(settings: RunSettings, shapes: HybridModel) -> str:
    backend, precision = settings.student.backend, settings.student.precision
    sizes = {mixer.head_size for mixer in shapes.mixer_configs.values()}
    if backend == "auto":
        backend = "triton" if settings.device == "cuda" else "native"
        reasons = (why_unavailable(backend, settings.device, torch.float32, size) for size in sizes)
        if reason := next(filter(None, reasons), None):
            return f"chunked, in PyTorch: {reason}"
    if backend != "triton":
        return backend
    if precision == "auto":
        precision = "balanced" if settings.precision == "bf16" else "fp32"
    return f"triton, {precision}"


def _check_data(run: Run, stage: StagePlan) -> None:
    """Refuse now, not after days, data in which a stage finds nothing to learn.

    It is tokenized for this; the stage finds it in the cache.
    """
    settings, vocab = run.plan.settings, run.shapes.lm.config.vocab_size
    tokens, val = tokens_of(
        settings.data, stage.settings.data, settings.endless_tokens, run.tokenizer, vocab, run.world
    )
    try:
        check_targets(stage, tokens, val)
    finally:
        close(tokens)
