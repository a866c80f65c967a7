"""The training loop of one stage.

Rows to micro-batches, schedule, checkpoints, and an orderly end. Owns the loop only: the engine owns the devices, the
step the objective, the source the data; everything else is left to callbacks.
"""

from __future__ import annotations

import math
import sys
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Generic, NoReturn

import torch
from torch import Tensor, nn

from ..errors import CONTINUE, Interrupted, UserError
from .callbacks import Callback
from .checkpoint import Checkpoint, Checkpointer, rng_state, set_rng_state
from .deepspeed_engine import Engine
from .metrics import Score
from .nan_probe import find_nonfinite
from .protocols import AnyBatch, Carried, RowSource, Step, StepResult
from .schedule import EarlyEnd, EarlyStop, Schedule, StageLength
from .settings import EarlyStopConfig
from .stop_signal import StopSignal
from .throughput import Throughput, memory_mb

SHAPE = {"batch_tokens": "batch.tokens", "seq_len": "data.seq_len"}  # fields of a stage, by their names in checkpoints
LAST_EVALUATION = 0.1  # of an interval: nearer to the end than this none is made but the last


@dataclass(frozen=True)
class TrainingPlan:
    """What the loop of a stage follows.

    Attributes:
        stage: name, for metrics and messages.
        length, schedule: steps and learning rates.
        micro_rows: rows of one forward pass.
        evaluate_every: steps between evaluations, to which those of checkpoints are added; 0: only after the last
            step, whose evaluation stands for one that would come just before it.
        save_every: steps between checkpoints, 0: only after the last step.
        early_stop: when it ends before its last step; None: never.
        labels: names of the entries of 1-d metrics, {"layers": [0, 1, 3]}; default 0, 1, 2, ...
    """

    stage: str
    length: StageLength
    schedule: Schedule
    micro_rows: int
    evaluate_every: int = 0
    save_every: int = 0
    early_stop: EarlyStopConfig | None = None
    labels: Mapping[str, Sequence[int | str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.micro_rows < 1:
            raise UserError(f"stages.{self.stage}.batch.micro_rows={self.micro_rows}", "must be at least 1")


class Trainer(Generic[AnyBatch]):
    """Trains one stage from its current step to its end.

    Update s (from 1) uses the rows [(s - 1) R, s R), R = `plan.length.rows_per_step`; rank r takes every world-size-th
    of them, `micro_rows` at a time. So the data a step sees depends on its number only, and ranks need not divide the
    rows, of which there is one for each at least.

    Args:
        engine, step, rows: see their modules.
        plan: of the stage.
        checkpointer: of this stage. None: nothing is saved.
        settings: JSON values that a resumed run must share (seed, data identity, ...); batch size and row length are
            added here.
        carried: what rows of a step leave for the next, saved with it; None: nothing.
        callbacks: told what happens, see `Callback`.

    Attributes:
        done: optimizer steps done.
        tokens: read in these steps by all ranks; padding does not count.
        seconds_left: estimate for the rest of the stage.
        seconds_per_step: of the steps so far, the later ones counting more.
        score: of the last evaluation; None: there was none since training began or went on.
        early_end: where and why the stage ended early; None: it has not.
    """

    def __init__(
        self,
        engine: Engine,
        step: Step[AnyBatch],
        rows: RowSource[AnyBatch],
        plan: TrainingPlan,
        *,
        checkpointer: Checkpointer | None = None,
        settings: Mapping | None = None,
        carried: Carried | None = None,
        callbacks: Sequence[Callback] = (),
    ):
        self.engine, self.step, self.rows, self.plan = engine, step, rows, plan
        self.world = engine.world
        self.checkpointer, self.carried = checkpointer, carried
        length = plan.length
        self.settings = _with_shape(settings or {}, length)
        self.callbacks = [callback for callback in callbacks if self.world.is_main or not callback.main_only]
        self.done = self.tokens = 0
        self.seconds_left, self.seconds_per_step = math.inf, 0.0
        self.score: Score | None = None
        self.early_end: EarlyEnd | None = None
        self._early_stop = EarlyStop(plan.early_stop) if plan.early_stop is not None else None
        self._saved: int | None = None
        self._unprinted: OSError | None = None

    @property
    def finished(self) -> bool:
        """Whether the stage is at its end."""
        return self.done == self.plan.length.steps or self.early_end is not None

    def restore(self, checkpoint: Checkpoint, joined: Collection[str] = ()) -> None:
        """Continue from a checkpoint of this stage.

        On one process this is bit for bit as if the stage had never stopped.

        Args:
            checkpoint: of this stage.
            joined: names that begin to train at this very step. Where the checkpoint does not know them, they keep the
                model's weights and start with a fresh optimizer state.

        Raises:
            UserError: made with another batch size, row length, seed or data, or without an optimizer.
        """
        check_resumable(checkpoint, self.plan.stage, self.settings, self.plan.length)
        optimizer = checkpoint.optimizer()
        if optimizer is None:
            raise UserError(f"checkpoint {checkpoint.path} has no optimizer state", "start the next stage from it")
        trained = {n: t for n, t in checkpoint.tensors().items() if n in self.engine.trainable}
        self.engine.load_parameters(trained, absent=set(joined) - set(trained))
        self.engine.load_optimizer_state(optimizer, absent={n for n in joined if f"{n}/step" not in optimizer})
        if self.carried is not None:
            self.carried.load(checkpoint.carried())
        set_rng_state(checkpoint.state["rng"])
        self.done = self._saved = checkpoint.step
        self.tokens = checkpoint.state["tokens"]
        if self._early_stop is not None and (counted := checkpoint.state.get("early_stop")):
            self._early_stop.restore(counted)
            self._end_early(self._early_stop.due)

    def fit(self, until: int | None = None) -> None:
        """Train to the end of the stage, which may come early, evaluate and save.

        Args:
            until: stop after this step instead, and save.

        Raises:
            UserError: a loss or gradient that is not finite (the last good checkpoint stays), or no space to save.
            Interrupted: SIGTERM or SIGINT came on any rank; the step was finished and saved. KeyboardInterrupt, if that
                was before the first one.
            OSError: nothing more can be printed, as into a closed pipe; the step was saved, too.
        """
        plan, steps = self.plan, self.plan.length.steps
        end = steps if until is None else min(until, steps)
        with StopSignal() as signal, self._callbacks_told():
            throughput = Throughput()
            while self.done < end and self.early_end is None:
                throughput.mark()
                with self._heard():
                    batches, step, read = self._micro_batches()
                here = sum(step.count(batch) for batch in batches)
                count, tokens, stopped = self.world.all_reduce_sum([here, read, self._ends(signal)])
                if stopped:
                    self._interrupt()
                # a step in which nothing counts has loss 0
                self._update(batches, step, max(int(count), 1), int(tokens), throughput)
                saves = self.done == end or _due(self.done, plan.save_every)
                if self.done == steps or self._evaluation_due or (saves and plan.evaluate_every):
                    self._evaluate()
                if self.finished:
                    self._tell(lambda callback: callback.finish(self))
                if saves or self.finished:
                    self._save(required=self.done == end or self.finished)
            # a signal during the last step must not be lost: more stages may follow
            if self.world.all_reduce_sum([self._ends(signal)])[0]:
                self._interrupt()

    @property
    def _evaluation_due(self) -> bool:
        every, left = self.plan.evaluate_every, self.plan.length.steps - self.done
        return _due(self.done, every) and left > every * LAST_EVALUATION

    @property
    def _places(self) -> range:
        """This rank's places among the rows of a step."""
        return range(self.plan.length.rows_per_step)[self.world.rank :: self.world.size]

    def _micro_batches(self) -> tuple[list[AnyBatch], Step[AnyBatch], int]:
        """Return this rank's micro-batches, the step that trains on them, and their tokens.

        They are as many as any other rank has.
        """
        R, n, world = self.plan.length.rows_per_step, self.plan.micro_rows, self.world
        if world.size > 1:  # what dropout draws is a function of step and rank: the same after a resume
            key = f"{self.settings.get('seed', 0)} {self.plan.stage} {self.done} {world.rank}"
            torch.manual_seed(zlib.crc32(key.encode()))
        first = self.done * R
        rows = [first + place for place in self._places]
        batches = [self.rows.batch(rows[i : i + n]).to(world.device) for i in range(0, len(rows), n)]
        tokens = sum(batch.num_tokens for batch in batches)
        if len(batches) == math.ceil(math.ceil(R / world.size) / n):
            return batches, self.step, tokens
        # engines work in step with each other: one forward and backward that counts nothing
        idle = self.rows.batch(rows[-1:]).to(world.device)
        return [*batches, idle], _Except(self.step, idle), tokens

    def _update(
        self, batches: Sequence[AnyBatch], step: Step[AnyBatch], count: int, tokens: int, throughput: Throughput
    ) -> None:
        """Make an optimizer step, and a row of metrics of it.

        Args:
            count: items that the loss is divided by.
            tokens: of the step. Both are those of all ranks.
        """
        length, number = self.plan.length, self.done + 1
        rates = self.plan.schedule.rates(number, length)
        self.engine.set_rates(rates)
        with self._heard():
            result = self.engine.train_step(batches, step, count)
        if not result.finite:
            self._refuse(number, result, batches, step)
        self.done, self.tokens = number, self.tokens + tokens
        speed, self.seconds_left = throughput.step(tokens, length.steps - number)
        self.seconds_per_step = throughput.seconds_per_step
        first, *others = rates
        row = {
            **self._row("train"),
            "loss": result.loss,
            "lr": rates[first],
            **{f"lr_{group}": rates[group] for group in others},
            "grad_norm": result.grad_norm,
            "tokens_per_s": speed,
            "memory_mb": memory_mb(self.world.device),
            "time": time.time(),
            **{name: self._labeled(name, value) for name, value in result.metrics.items()},
        }
        self._tell(lambda callback: callback.step(self, row))

    def _evaluate(self) -> None:
        numbers: dict[str, float | str] = {}
        for callback in self.callbacks:
            numbers |= callback.evaluate(self)
        self.score = Score.of(self.done, numbers)
        if numbers:
            row = {**self._row("eval"), **numbers, "time": time.time()}
            self._tell(lambda callback: callback.evaluation(self, row))
            if self._early_stop is not None:
                self._early_stop.note(self.score)
        if self._early_stop is None:
            return
        # what rank 0 has counted holds for all
        self._end_early(bool(self.world.all_reduce_sum([self.world.is_main and self._early_stop.due])[0]))
        if self.early_end is not None:
            notice = f"{self.plan.stage} {self.done}/{self.plan.length.steps}  STOPS EARLY: {self.early_end.reason}"
            self._tell(lambda callback: callback.notice(self, notice))

    def _end_early(self, due: bool) -> None:
        """End the stage here if that is due, and before its last step."""
        steps = self.plan.length.steps
        if self._early_stop is not None and due and self.done < steps:
            self.early_end = self._early_stop.end(self.done, steps)

    def _tell(self, what: Callable[[Callback], object]) -> None:
        """Tell the callbacks, in their order; where one cannot print what it is told, the run ends once it is saved."""
        for callback in self.callbacks:
            try:
                what(callback)
            except OSError as error:
                self._unprinted = self._unprinted or error

    def _row(self, kind: str) -> dict:
        """Return the beginning of a row of metrics."""
        return {"kind": kind, "stage": self.plan.stage, "step": self.done, "tokens": self.tokens}

    def _labeled(self, name: str, value: float | list[float]) -> float | dict[str, float]:
        if not isinstance(value, list):
            return value
        return {str(k): v for k, v in zip(self.plan.labels.get(name, range(len(value))), value, strict=True)}

    def _save(self, required: bool) -> None:
        if self.checkpointer is None or self._saved == self.done:
            return
        trained, optimizer = self.engine.full_parameters(), self.engine.optimizer_state()
        carried = self._gather_carried()
        problem = None
        if self.world.is_main:
            try:
                self._write(self.checkpointer, trained, optimizer, carried, required)
            except UserError as error:
                problem = error
        (failed,) = self.world.all_reduce_sum([problem is not None])
        if failed:
            raise problem or UserError("rank 0 could not write the checkpoint", "its own message says why")

    def _gather_carried(self) -> dict[str, Tensor] | None:
        """Return what all rows of the last step left, (rows of a step, ...) by name, on rank 0; None: nothing.

        Every rank must call it.
        """
        if self.carried is None:
            return None
        R, world = self.plan.length.rows_per_step, self.world
        most = math.ceil(R / world.size)
        gathered = {}
        for name, own in self.carried.tensors(self._places).items():
            filled = torch.cat([own, own[:1].expand(most - len(own), *own.shape[1:])])
            if found := world.gather_tensor(filled):
                gathered[name] = torch.stack(found, 1).flatten(0, 1)[:R]
        return gathered

    def _write(
        self,
        checkpointer: Checkpointer,
        trained: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        carried: Mapping[str, Tensor] | None,
        required: bool,
    ) -> None:
        """Write a checkpoint, on rank 0."""
        length = self.plan.length
        tensors: dict[str, Tensor] = {}
        for callback in self.callbacks:
            tensors |= callback.extra_tensors(self)
        state = {
            "stage": self.plan.stage,
            "step": self.done,
            "tokens": self.tokens,
            "rows": self.done * length.rows_per_step,
            "finished": self.finished,
            "world_size": self.world.size,
            "settings": self.settings,
            "rng": rng_state(),
        }
        state |= {} if self._early_stop is None else {"early_stop": self._early_stop.state()}
        score = self.score if self.score is not None and self.score.step == self.done else None
        tensors |= trained
        if checkpointer.save(self.done, tensors, optimizer, state, required, score, carried) is not None:
            self._saved = self.done
            return
        notice = f"{self.plan.stage} {self.done}/{length.steps}  NOT SAVED: the disk is full"
        self._tell(lambda callback: callback.notice(self, notice))

    def _ends(self, signal: StopSignal) -> bool:
        """Return whether this rank has to end here."""
        return signal.received is not None or self._unprinted is not None

    def _interrupt(self) -> NoReturn:
        where = f"stage {self.plan.stage} stopped at step {self.done} of {self.plan.length.steps}"
        if self.checkpointer is None or not self.done:
            raise KeyboardInterrupt(where)  # nothing to save
        self._save(required=True)
        if self._unprinted is not None:
            raise self._unprinted
        raise Interrupted(f"{where}, saved in {self.checkpointer.directory}", CONTINUE)

    def _refuse(self, number: int, result: StepResult, batches: Sequence[AnyBatch], step: Step[AnyBatch]) -> NoReturn:
        """Raise an error that says what was not finite, where it began and in which rows."""
        R, stage = self.plan.length.rows_per_step, self.plan.stage
        first = (number - 1) * R
        begin, bad_batch = find_nonfinite(self.engine, batches, step)
        here = [0.0] * R
        for batch, loss in zip(batches, result.losses, strict=True):
            if batch is bad_batch or not math.isfinite(loss):
                for row in batch.rows:
                    here[row - first] = 1.0
        bad = self.world.all_reduce_sum(here)
        rows = [first + i for i in range(R) if bad[i]] or range(first, first + R)
        numbers = [f"loss {result.loss}", f"gradient norm {result.grad_norm}"]
        for name, value in result.metrics.items():
            labeled = self._labeled(name, value)
            entries = labeled.items() if isinstance(labeled, dict) else [("", labeled)]
            numbers += [f"{name} {k} {v}".replace("  ", " ") for k, v in entries if not math.isfinite(v)]
        numbers += [f"beginning in {begin}"] if begin else []
        saved = self.checkpointer.names() if self.checkpointer is not None else []
        raise UserError(
            f"stage {stage}, step {number}: {', '.join(numbers)}, in rows {_listed(rows)}; the update was not kept",
            (f"the last good checkpoint is {saved[-1]}; " if saved else "")
            + f"lower stages.{stage}.optim.lr or look at these rows of the data",
        )

    @contextmanager
    def _callbacks_told(self) -> Iterator[None]:
        """Tell the callbacks of the beginning and, whatever happens, of the end."""
        with ExitStack() as stack:
            for callback in self.callbacks:
                callback.begin(self)
                stack.callback(callback.end, self)
            yield

    @contextmanager
    def _heard(self) -> Iterator[None]:
        """Print what is wrong with this rank's rows, on this rank.

        Rank 0 prints what all have found.
        """
        try:
            yield
        except UserError as error:
            if not self.world.is_main:
                print(f"rank {self.world.rank}: {error}", file=sys.stderr, flush=True)
            raise


def check_resumable(checkpoint: Checkpoint, stage: str, settings: Mapping, length: StageLength) -> None:
    """Refuse a checkpoint from which a stage cannot go on as it began.

    Args:
        checkpoint: of the stage.
        stage: its name.
        settings: those of the trainer; batch size and row length are added here.
        length: of the stage.

    Raises:
        UserError: made with another batch size, row length, seed or data, or for a longer stage.
    """
    current = {"stage": stage} | _with_shape(settings, length)
    written = {"stage": checkpoint.state.get("stage")} | checkpoint.state.get("settings", {})
    for key in sorted(set(written) | set(current)):
        if written.get(key) != current.get(key):
            needed = f"stages.{stage}.{SHAPE[key]}={written.get(key)}" if key in SHAPE else "the settings"
            raise UserError(
                f"checkpoint {checkpoint.path} was made with {key}={written.get(key)!r}, not {current.get(key)!r}",
                f"resume with {needed} that it was made with, or start the stage again without --resume",
            )
    if checkpoint.step > length.steps:
        raise UserError(
            f"checkpoint {checkpoint.path} is at step {checkpoint.step}, the stage has {length.steps}",
            "raise the stage's tokens or start it again without --resume",
        )


def _with_shape(settings: Mapping, length: StageLength) -> dict:
    return dict(settings) | {"batch_tokens": length.batch_tokens, "seq_len": length.seq_len}


class _Except(Generic[AnyBatch]):
    """A step in which one of the micro-batches counts nothing."""

    def __init__(self, step: Step[AnyBatch], idle: AnyBatch):
        self._step, self._idle = step, idle

    def count(self, batch: AnyBatch) -> int:
        return 0 if batch is self._idle else self._step.count(batch)

    def __call__(self, model: nn.Module, batch: AnyBatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = self._step(model, batch)
        if batch is self._idle:
            loss, metrics = 0 * loss, {name: 0 * value for name, value in metrics.items()}
        return loss, metrics


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _listed(rows: Sequence[int], most: int = 8) -> str:
    return ", ".join(map(str, rows[:most])) + (f" and {len(rows) - most} more" if len(rows) > most else "")
