"""The training loop of one stage: rows to micro-batches, schedule, metrics, checkpoints, and an orderly end.

Owns the loop only: the engine owns the devices, the step the objective, the source the data.
"""

from __future__ import annotations

import math
import signal
import sys
import time
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from ..errors import Interrupted, UserError
from .checkpoint import Checkpoint, Checkpointer
from .deepspeed_engine import Engine
from .metrics import Console, MetricsWriter, Throughput, memory_mb
from .nan_probe import NaNProbe
from .protocols import RowSource, Step, StepResult, TrainingBatch
from .rng import rng_state, set_rng_state
from .schedule import Schedule, StageLength


class Trainer:
    """Trains one stage from its current step to its end.

    Update s (from 1) uses the rows [(s - 1) R, s R) of the source, R = `budget.rows_per_step`; rank r takes every
    world-size-th of them, `micro_rows` at a time. So the data a step sees depends on its number only, and ranks need
    not divide the rows.

    Args:
        engine, step, source: see their modules.
        stage: name, for metrics and messages.
        budget, schedule: length and learning rates.
        micro_rows: rows of one forward pass.
        checkpointer: of this stage. None: nothing is saved.
        settings: JSON values that a resumed run must share (seed, data identity, ...); batch size and row length are
            added here.
        metrics, console: used on rank 0 only; None: nothing is written or shown.
        evaluate: called with the number of steps done, on every rank; its numbers become an "eval" row.
        evaluate_every: steps between evaluations, 0: only after the last step.
        save_every: steps between checkpoints, 0: only after the last step.
        other_tensors: more weights to save than those trained here (trained by earlier stages), by the same names.
        load_tensors: called with all weights of a checkpoint before the engine takes its own.
        labels: names of the entries of 1-d metrics, {"layers": [0, 1, 3]}; default 0, 1, 2, ...
        flops_per_token: operations that a token of the stage needs.
        peak_flops: operations that all devices together can do in a second; None: unknown, rows have no "mfu".

    Attributes:
        done: optimizer steps done.
    """

    def __init__(
        self,
        engine: Engine,
        step: Step,
        source: RowSource,
        *,
        stage: str,
        budget: StageLength,
        schedule: Schedule,
        micro_rows: int,
        checkpointer: Checkpointer | None = None,
        settings: Mapping | None = None,
        metrics: MetricsWriter | None = None,
        console: Console | None = None,
        evaluate: Callable[[int], dict] | None = None,
        evaluate_every: int = 0,
        save_every: int = 0,
        other_tensors: Callable[[], Mapping[str, Tensor]] | None = None,
        load_tensors: Callable[[Mapping[str, Tensor]], None] | None = None,
        labels: Mapping[str, Sequence[int | str]] | None = None,
        flops_per_token: float = 0.0,
        peak_flops: float | None = None,
    ):
        self.engine, self.step, self.source = engine, step, source
        self.world = engine.world
        self.stage, self.budget, self.schedule = stage, budget, schedule
        self.micro_rows = micro_rows
        self.checkpointer = checkpointer
        self.settings = dict(settings or {}) | {"batch_tokens": budget.batch_tokens, "seq_len": budget.seq_len}
        self.metrics = metrics if self.world.is_main else None
        self.console = console if self.world.is_main else None
        self.evaluate, self.evaluate_every, self.save_every = evaluate, evaluate_every, save_every
        self.other_tensors, self.load_tensors = other_tensors, load_tensors
        self.labels = labels or {}
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.done = 0
        self._saved: int | None = None
        self._signal: int | None = None
        if micro_rows < 1:
            raise UserError(f"stages.{stage}.batch.micro_rows={micro_rows}", "must be at least 1")
        if budget.rows_per_step < self.world.size:
            raise UserError(
                f"stages.{stage}: {budget.rows_per_step} rows a step are too few for {self.world.size} processes",
                f"raise batch.tokens to at least {self.world.size} x data.seq_len={budget.seq_len}",
            )

    def restore(self, checkpoint: Checkpoint, joined: Collection[str] = ()) -> None:
        """Continue from a checkpoint of this stage: on one process, bit for bit as if it had never stopped.

        Args:
            joined: names that begin to train at this very step. Where the checkpoint does not know them, they keep the
                model's weights and start with a fresh optimizer state.

        Raises:
            UserError: made with another batch size, row length, seed or data, or without an optimizer.
        """
        state = checkpoint.state
        wanted = {"stage": self.stage} | self.settings
        there = {"stage": state.get("stage")} | state.get("settings", {})
        for key in sorted(set(there) | set(wanted)):
            if there.get(key) != wanted.get(key):
                raise UserError(
                    f"checkpoint {checkpoint.path} was made with {key}={there.get(key)!r}, not {wanted.get(key)!r}",
                    "resume with the settings it was made with, or start the stage again without --resume",
                )
        optimizer = checkpoint.optimizer()
        if optimizer is None:
            raise UserError(f"checkpoint {checkpoint.path} has no optimizer state", "start the next stage from it")
        if checkpoint.step > self.budget.steps:
            raise UserError(
                f"checkpoint {checkpoint.path} is at step {checkpoint.step}, the stage has {self.budget.steps}",
                "raise the stage's tokens or start it again without --resume",
            )
        tensors = checkpoint.tensors()
        if self.load_tensors is not None:
            self.load_tensors(tensors)
        trained = {n: t for n, t in tensors.items() if n in self.engine.trainable}
        self.engine.load_parameters(trained, absent=set(joined) - set(trained))
        self.engine.load_optimizer_state(optimizer, absent={n for n in joined if f"{n}/step" not in optimizer})
        set_rng_state(state["rng"])
        self.done = self._saved = checkpoint.step

    def fit(self, until: int | None = None) -> None:
        """Train to the end of the stage, evaluate and save.

        Args:
            until: stop after this step instead, and save.

        Raises:
            UserError: a loss or gradient that is not finite (the last good checkpoint stays), or no space to save.
            Interrupted: SIGTERM or SIGINT came on any rank; the step was finished and saved.
        """
        if self.metrics is not None:
            self.metrics.begin(self.stage, self.done or None)
        steps = self.budget.steps
        end = steps if until is None else min(until, steps)
        with self._signals(), self.console or nullcontext():
            pace = Throughput()
            while self.done < end:
                pace.mark()
                with self._heard():
                    batches, step = self._micro_batches(self.done)
                count = sum(step.count(batch) for batch in batches)
                count, stopped = self.world.all_reduce_sum([count, self._signal is not None])
                if stopped:
                    self._interrupt()
                number = self.done + 1
                rates = self.schedule.rates(number, self.budget)
                self.engine.set_rates(rates)
                # a step in which nothing counts has loss 0
                with self._heard():
                    result = self.engine.train_step(batches, step, max(int(count), 1))
                if not result.finite:
                    self._refuse(number, result, batches, step)
                self.done = number
                self._report(result, rates, pace)
                if self.evaluate is not None and (number == steps or _due(number, self.evaluate_every)):
                    self._evaluate()
                if number == end or _due(number, self.save_every):
                    self._save(required=number == end)
            # a signal during the last step must not be lost: more stages may follow
            if self.world.all_reduce_sum([self._signal is not None])[0]:
                self._interrupt()

    def _micro_batches(self, done: int) -> tuple[list[TrainingBatch], Step]:
        """This rank's micro-batches, as many as any other rank has, and the step that trains on them."""
        R, n, world = self.budget.rows_per_step, self.micro_rows, self.world
        if world.size > 1:  # what dropout draws is a function of step and rank: the same after a resume
            torch.manual_seed(zlib.crc32(f"{self.settings.get('seed', 0)} {self.stage} {done} {world.rank}".encode()))
        first = done * R
        rows = range(first, first + R)[world.rank :: world.size]
        batches = [self.source.batch(rows[i : i + n]).to(world.device) for i in range(0, len(rows), n)]
        if len(batches) == math.ceil(math.ceil(R / world.size) / n):
            return batches, self.step
        # engines work in step with each other: one forward and backward that counts nothing
        idle = self.source.batch(rows[-1:]).to(world.device)
        return [*batches, idle], _Except(self.step, idle)

    def _report(self, result: StepResult, rates: Mapping[str, float], pace: Throughput) -> None:
        tokens = self.budget.tokens_per_step
        speed, left = pace.step(tokens, self.budget.steps - self.done)
        first, *others = rates
        mfu = {"mfu": speed * self.flops_per_token / self.peak_flops} if self.peak_flops else {}
        row = {
            "kind": "train",
            "stage": self.stage,
            "step": self.done,
            "tokens": self.done * tokens,
            "loss": result.loss,
            "lr": rates[first],
            **{f"lr_{group}": rates[group] for group in others},
            "grad_norm": result.grad_norm,
            "tokens_per_s": speed,
            **mfu,
            "memory_mb": memory_mb(self.world.device),
            "time": time.time(),
            **{name: self._labeled(name, value) for name, value in result.metrics.items()},
        }
        if self.metrics is not None:
            self.metrics.write(row)
        if self.console is not None:
            self.console.step(row, left)

    def _labeled(self, name: str, value: float | list[float]) -> float | dict[str, float]:
        if not isinstance(value, list):
            return value
        return {str(k): v for k, v in zip(self.labels.get(name, range(len(value))), value, strict=True)}

    def _evaluate(self) -> None:
        numbers = self.evaluate(self.done)
        tokens = self.done * self.budget.tokens_per_step
        row = {"kind": "eval", "stage": self.stage, "step": self.done, "tokens": tokens, **numbers, "time": time.time()}
        if self.metrics is not None:
            self.metrics.write(row)
        if self.console is not None:
            self.console.evaluation(row)

    def _save(self, required: bool) -> None:
        if self.checkpointer is None or self._saved == self.done:
            return
        trained, optimizer = self.engine.full_parameters(), self.engine.optimizer_state()
        problem = None
        if self.world.is_main:
            tensors = dict(self.other_tensors() if self.other_tensors is not None else {}) | trained
            state = {
                "stage": self.stage,
                "step": self.done,
                "tokens": self.done * self.budget.tokens_per_step,
                "rows": self.done * self.budget.rows_per_step,
                "finished": self.done == self.budget.steps,
                "world_size": self.world.size,
                "settings": self.settings,
                "rng": rng_state(),
            }
            try:
                path = self.checkpointer.save(self.done, tensors, optimizer, state, required)
            except UserError as error:
                problem = error
            else:
                self._saved = self._saved if path is None else self.done
                if path is None and self.console is not None:
                    self.console.say(f"{self.stage} {self.done}/{self.budget.steps}  NOT SAVED: the disk is full")
        (failed,) = self.world.all_reduce_sum([problem is not None])
        if failed:
            raise problem or UserError("rank 0 could not write the checkpoint", "its own message says why")

    def _interrupt(self) -> None:
        where = f"stage {self.stage} stopped at step {self.done} of {self.budget.steps}"
        if self.checkpointer is None or not self.done:
            raise Interrupted(f"{where}, nothing to save", "start it again")
        self._save(required=True)
        raise Interrupted(f"{where}, saved in {self.checkpointer.directory}", "continue with --resume")

    def _refuse(self, number: int, result: StepResult, batches: Sequence[TrainingBatch], step: Step) -> None:
        """Say what was not finite, where it began and in which rows."""
        R = self.budget.rows_per_step
        first = (number - 1) * R
        begin, guilty = self._search(batches, step)
        bad = [0] * R
        for batch, loss in zip(batches, result.losses, strict=True):
            if batch is guilty or not math.isfinite(loss):
                for row in batch.rows:
                    bad[row - first] = 1
        bad = self.world.all_reduce_sum(bad)
        rows = [first + i for i in range(R) if bad[i]] or range(first, first + R)
        parts = [f"loss {result.loss}", f"gradient norm {result.grad_norm}"]
        for name, value in result.metrics.items():
            labeled = self._labeled(name, value)
            entries = labeled.items() if isinstance(labeled, dict) else [("", labeled)]
            parts += [f"{name} {k} {v}".replace("  ", " ") for k, v in entries if not math.isfinite(v)]
        parts += [f"beginning in {begin}"] if begin else []
        saved = self.checkpointer.names() if self.checkpointer is not None else []
        raise UserError(
            f"stage {self.stage}, step {number}: {', '.join(parts)}, in rows {_listed(rows)}; the update was not kept",
            (f"the last good checkpoint is {saved[-1]}; " if saved else "")
            + f"lower stages.{self.stage}.optim.lr or look at these rows of the data",
        )

    def _search(self, batches: Sequence[TrainingBatch], step: Step) -> tuple[str | None, TrainingBatch | None]:
        """Run the micro-batches of a bad step again, up to the first that some rank finds something in.

        Returns:
            Where it begins (on the first rank that has found something), and the micro-batch if this rank has; None
            where the trouble does not show again.
        """
        for batch in batches:
            with NaNProbe(self.engine.model) as probe:
                self.engine.backward(batch, step)
            found = self.world.gather(0 if probe.found is None else 1 + probe.found)
            if any(found):
                return probe.places[int(next(filter(None, found))) - 1], None if probe.found is None else batch
        return None, None

    @contextmanager
    def _heard(self):
        """What is wrong with this rank's rows is said by this rank: the first one speaks for what all have found."""
        try:
            yield
        except UserError as error:
            if not self.world.is_main:
                print(f"rank {self.world.rank}: {error}", file=sys.stderr, flush=True)
            raise

    @contextmanager
    def _signals(self):
        """While training, the first SIGTERM or SIGINT asks for an orderly end, a second one ends at once."""

        def note(number, frame):
            self._signal = number
            for each, handler in previous.items():
                signal.signal(each, handler)

        previous = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
        for each in previous:
            signal.signal(each, note)
        try:
            yield
        finally:
            for each, handler in previous.items():
                signal.signal(each, handler)


class _Except:
    """A step in which one of the micro-batches counts nothing."""

    def __init__(self, step: Step, idle: TrainingBatch):
        self._step, self._idle = step, idle

    def count(self, batch: TrainingBatch) -> int:
        return 0 if batch is self._idle else self._step.count(batch)

    def __call__(self, model, batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = self._step(model, batch)
        if batch is self._idle:
            loss, metrics = 0 * loss, {name: 0 * value for name, value in metrics.items()}
        return loss, metrics


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _listed(rows: Sequence[int], most: int = 8) -> str:
    return ", ".join(map(str, rows[:most])) + (f" and {len(rows) - most} more" if len(rows) > most else "")
