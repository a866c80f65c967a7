"""What happens besides the updates of a stage: rows of metrics, lines on the console, evaluations, extra tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from .metrics import Console, MetricsWriter

if TYPE_CHECKING:
    from .trainer import Trainer


class Callback:
    """Told by the trainer what happens; does nothing by itself. Several are told in the order they are given in.

    Attributes:
        main_only: told on rank 0 alone, so it must not communicate; otherwise every rank has one.
    """

    main_only: ClassVar[bool] = False

    def begin(self, trainer: Trainer) -> None:
        """Training starts or goes on after `trainer.done` steps."""

    def end(self, trainer: Trainer) -> None:
        """Training has ended, well or with an error."""

    def step(self, trainer: Trainer, row: dict) -> None:
        """An update was made.

        Args:
            row: of metrics; what is added to it the later callbacks see.
        """

    def evaluate(self, trainer: Trainer) -> Mapping[str, float]:
        """An evaluation is due.

        Returns:
            Numbers by name for its row.
        """
        return {}

    def evaluation(self, trainer: Trainer, row: Mapping) -> None:
        """An evaluation was made; `row` is its row of metrics."""

    def extra_tensors(self, trainer: Trainer) -> Mapping[str, Tensor]:
        """A checkpoint is about to be written, by rank 0.

        Returns:
            Weights to save besides those that train here, by the same names.
        """
        return {}

    def notice(self, trainer: Trainer, line: str) -> None:
        """The trainer has something to tell."""


class WriteMetrics(Callback):
    """Write every row to metrics.jsonl. Comes after the callbacks that add to rows."""

    main_only = True

    def __init__(self, writer: MetricsWriter):
        self.writer = writer

    def begin(self, trainer: Trainer) -> None:
        self.writer.begin(trainer.plan.stage, trainer.done or None)

    def step(self, trainer: Trainer, row: dict) -> None:
        self.writer.write(row)

    def evaluation(self, trainer: Trainer, row: Mapping) -> None:
        self.writer.write(row)


class ShowProgress(Callback):
    """Show rows on the console. Comes after the callbacks that add to rows."""

    main_only = True

    def __init__(self, console: Console):
        self.console = console

    def begin(self, trainer: Trainer) -> None:
        self.console.__enter__()

    def end(self, trainer: Trainer) -> None:
        self.console.__exit__(None, None, None)

    def step(self, trainer: Trainer, row: dict) -> None:
        self.console.step(row, trainer.seconds_left)

    def evaluation(self, trainer: Trainer, row: Mapping) -> None:
        self.console.evaluation(row)

    def notice(self, trainer: Trainer, line: str) -> None:
        self.console.say(line)


class Evaluate(Callback):
    """Evaluate by a function that every rank calls.

    Args:
        function: from the number of steps done to numbers by name.
    """

    def __init__(self, function: Callable[[int], Mapping[str, float]]):
        self.function = function

    def evaluate(self, trainer: Trainer) -> Mapping[str, float]:
        return self.function(trainer.done)


class MeasureMFU(Callback):
    """Add "mfu", model FLOP utilization, to training rows.

    Args:
        flops_per_token: operations that a token of the stage needs.
        peak_flops: operations that all devices together can do in a second.
    """

    main_only = True

    def __init__(self, flops_per_token: float, peak_flops: float):
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops

    def step(self, trainer: Trainer, row: dict) -> None:
        row["mfu"] = row["tokens_per_s"] * self.flops_per_token / self.peak_flops


class SaveExtra(Callback):
    """Save weights that do not train in this stage with those that do.

    Args:
        tensors: by name; on rank 0 only.
    """

    main_only = True

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = tensors

    def extra_tensors(self, trainer: Trainer) -> Mapping[str, Tensor]:
        return self.tensors
