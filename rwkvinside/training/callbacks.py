"""What happens in a stage besides its updates.

Rows of metrics, lines on the console, evaluations, extra tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from .metrics import Console, MetricsWriter, Score

if TYPE_CHECKING:
    from .trainer import Trainer

WORSE = 0.05  # part by which a validation score may rise above the best one before this is said


class Callback:
    """Told by the trainer what happens; does nothing by itself.

    Several callbacks are told in their order.

    Attributes:
        main_only: told on rank 0 alone, so it must not communicate; otherwise every rank has one.
    """

    main_only: ClassVar[bool] = False

    def begin(self, trainer: Trainer) -> None:
        """Note that training starts, or goes on after `trainer.done` steps."""

    def end(self, trainer: Trainer) -> None:
        """Note that training has ended, well or with an error."""

    def step(self, trainer: Trainer, row: dict) -> None:
        """Note that an update was made.

        Args:
            trainer: that made it.
            row: of metrics; later callbacks see what is added to it.
        """

    def evaluate(self, trainer: Trainer) -> Mapping[str, float | str]:
        """Return what an evaluation that is due finds.

        Returns:
            Numbers by name for its row of metrics, and "teacher": what they compare with, where that is not the
            original model.
        """
        return {}

    def evaluation(self, trainer: Trainer, row: Mapping) -> None:
        """Note that an evaluation was made.

        Args:
            trainer: that made it.
            row: of metrics.
        """

    def sample(self, trainer: Trainer, row: Mapping) -> None:
        """Note that a sample was made.

        Args:
            trainer: whose model made it.
            row: of metrics.
        """

    def finish(self, trainer: Trainer) -> None:
        """Note that the stage is at its end, before its last checkpoint is written."""

    def extra_tensors(self, trainer: Trainer) -> Mapping[str, Tensor]:
        """Return weights to save in addition to those that train.

        Called on rank 0 when a checkpoint is about to be written.

        Returns:
            Tensors by the names that weights have in checkpoints.
        """
        return {}

    def notice(self, trainer: Trainer, line: str) -> None:
        """Tell the user something that the trainer has noticed."""


class WriteMetrics(Callback):
    """Writes every row to metrics.jsonl.

    Comes after the callbacks that add to rows.

    Args:
        writer: of the run's metrics.
    """

    main_only = True

    def __init__(self, writer: MetricsWriter):
        self.writer = writer

    def begin(self, trainer: Trainer) -> None:
        """Drop the rows that will be written again."""
        self.writer.begin(trainer.plan.stage, trainer.done or None)

    def step(self, trainer: Trainer, row: dict) -> None:
        """Write a training row."""
        self.writer.write(row)

    def evaluation(self, trainer: Trainer, row: Mapping) -> None:
        """Write an evaluation row."""
        self.writer.write(row)

    def sample(self, trainer: Trainer, row: Mapping) -> None:
        """Write a sample row."""
        self.writer.write(row)


class ShowProgress(Callback):
    """Shows rows on the console.

    Comes after the callbacks that add to rows.

    Args:
        console: of the stage.
        later: steps of this stage that take as long as all stages after it.
    """

    main_only = True

    def __init__(self, console: Console, later: float = 0.0):
        self.console, self.later = console, later

    def begin(self, trainer: Trainer) -> None:
        """Open the console."""
        self.console.__enter__()

    def end(self, trainer: Trainer) -> None:
        """Close the console."""
        self.console.__exit__(None, None, None)

    def step(self, trainer: Trainer, row: dict) -> None:
        """Show a training row."""
        self.console.step(row, trainer.seconds_left, self.later * trainer.seconds_per_step)

    def evaluation(self, trainer: Trainer, row: Mapping) -> None:
        """Show an evaluation row."""
        self.console.evaluation(row)

    def sample(self, trainer: Trainer, row: Mapping) -> None:
        """Show a sample row."""
        self.console.sample(row)

    def notice(self, trainer: Trainer, line: str) -> None:
        """Show a line."""
        self.console.say(line)


class Evaluate(Callback):
    """Evaluates by a function that every rank calls.

    Args:
        function: from the number of steps done to numbers by name.
    """

    def __init__(self, function: Callable[[int], Mapping[str, float | str]]):
        self.function = function

    def evaluate(self, trainer: Trainer) -> Mapping[str, float | str]:
        """Return the function's numbers."""
        return self.function(trainer.done)


class WriteSamples(Callback):
    """Lets the model write, by a function that every rank calls.

    Args:
        function: from the number of steps done to texts, {"prompt", "student"} each, and "teacher" where there is one.
        every: steps between samples; 0: none.
        last: whether there is one at the end of the stage in any case.
    """

    def __init__(self, function: Callable[[int], list[dict[str, str]]], every: int, last: bool):
        self.function, self.every, self.last = function, every, last

    def step(self, trainer: Trainer, row: dict) -> None:
        """Make a sample where one is due."""
        if self._due(trainer):
            self._write(trainer)

    def finish(self, trainer: Trainer) -> None:
        """Make a sample at the end, if there is none of this step."""
        if self.last and not self._due(trainer):
            self._write(trainer)

    def _due(self, trainer: Trainer) -> bool:
        return self.every > 0 and trainer.done % self.every == 0

    def _write(self, trainer: Trainer) -> None:
        """Make a sample, and tell the others of it."""
        if not (samples := self.function(trainer.done)):
            return
        place = {"kind": "sample", "stage": trainer.plan.stage, "step": trainer.done, "tokens": trainer.tokens}
        for callback in trainer.callbacks:
            callback.sample(trainer, place | {"samples": samples, "time": time.time()})


class WatchValidation(Callback):
    """Says at an evaluation that the student is getting worse on validation data.

    Comes after the callback that shows the evaluation.

    Args:
        scores: of earlier steps of the stage; step 0 is where it starts.
    """

    main_only = True

    def __init__(self, scores: Iterable[Score] = ()):
        self.scores = list(scores)

    def evaluation(self, trainer: Trainer, row: Mapping) -> None:
        """Compare with the best so far, and give notice where this is clearly worse."""
        score = trainer.score
        if score is None:
            return
        earlier = [one for one in self.scores if one.comparable(score) and one.step < score.step]
        self.scores.append(score)
        best = min(earlier, key=lambda one: one.value, default=score)
        if score.value <= (1 + WORSE) * best.value:
            return
        plan = trainer.plan
        where, kept = f"step {best.step}", "the best checkpoint is kept, and export takes it"
        if best.step == 0:
            where, kept = "its start", "or leave the stage out of `run`"
        elif not plan.save_every or best.step % plan.save_every:
            kept = "nothing was saved there: save more often, checkpoint.every_steps"
        line = (
            f"{plan.stage} {score.step}/{plan.length.steps}  WORSE ON VALIDATION: {score.measure} {score.value:.4g}, "
            f"best of the stage {best.value:.4g} at {where}; train on more text, lower stages.{plan.stage}.tokens or "
            f"optim.lr; {kept}"
        )
        for callback in trainer.callbacks:
            callback.notice(trainer, line)


class MeasureMFU(Callback):
    """Adds "mfu", the model FLOP utilization, to training rows.

    Args:
        flops_per_token: operations that a token of the stage needs.
        peak_flops: operations that all devices together can do in a second.
    """

    main_only = True

    def __init__(self, flops_per_token: float, peak_flops: float):
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops

    def step(self, trainer: Trainer, row: dict) -> None:
        """Add the number to a training row."""
        row["mfu"] = row["tokens_per_s"] * self.flops_per_token / self.peak_flops


class SaveExtra(Callback):
    """Saves weights that do not train in this stage with those that do.

    Args:
        tensors: by name; on rank 0 only.
    """

    main_only = True

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = tensors

    def extra_tensors(self, trainer: Trainer) -> Mapping[str, Tensor]:
        """Return the tensors."""
        return self.tensors
