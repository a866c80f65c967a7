"""metrics.jsonl and the console of a run.

Writes what it is given; what the numbers mean is decided elsewhere.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from types import TracebackType
from typing import Any, TextIO

from ..errors import UserError
from ..support.files import write_text
from ..support.progress import Progress, clock
from .loggers import Logger

FILE = "metrics.jsonl"
HINT = "free space, then continue with --resume"  # where a row cannot be written
MEASURES = ("kl", "ce")  # the first that an evaluation has: without a teacher there is no KL


@dataclass(frozen=True)
class Score:
    """One evaluation as one number, by which the checkpoints of a stage are compared; lower is better.

    Attributes:
        step: optimizer steps that were done.
        value: in nats.
        measure: which of the `MEASURES`.
        teacher: with which model the student was compared, "" is the original.
    """

    step: int
    value: float
    measure: str
    teacher: str = ""

    @classmethod
    def of(cls, step: int, numbers: Mapping[str, float | str]) -> Score | None:
        """Return the score of an evaluation, None where it has no finite number to compare."""
        for name in MEASURES:
            if name in numbers:
                value = float(numbers[name])
                return cls(step, value, name, str(numbers.get("teacher", ""))) if math.isfinite(value) else None
        return None

    def comparable(self, other: Score) -> bool:
        """Return whether both measure the same."""
        return (self.measure, self.teacher) == (other.measure, other.teacher)


class MetricsWriter:
    """Appends rows to RUN/metrics.jsonl, one JSON object a line.

    Each row is on its way to the disk before the next step begins.

    Args:
        run: the run directory, made if need be.
        logger: mirrors every row; the caller closes it.
    """

    def __init__(self, run: Path | str, logger: Logger | None = None):
        self.path = Path(run) / FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._logger = logger

    def write(self, row: Mapping) -> None:
        """Append a row.

        Numbers that are not finite become null, because JSON has none.

        Raises:
            UserError: there is no space.
        """
        finite = _finite(row)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}", HINT) from error
        if self._logger is not None:
            self._logger.write(finite)

    def begin(self, stage: str, step: int | None = None) -> None:
        """Drop what a run that starts or resumes a stage will write again.

        Rows of the stage after `step` go, with None all rows of the stage, and so does a last line that a killed
        process did not finish. Rows of other stages stay.

        Raises:
            UserError: there is no space.
        """
        if self._logger is not None:
            self._logger.begin(stage, step or 0)
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")[:-1]
        try:
            remaining = [line for line in lines if not _repeated(json.loads(line), stage, step)]
        except (AttributeError, TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{self.path} has a damaged line ({error})", "`rwkvinside report` names it") from error
        write_text(self.path, "".join(f"{line}\n" for line in remaining), hint=HINT)


class Console:
    """Training rows as lines of text, one per interval.

    On a terminal there is a live bar under them.

    Args:
        stage, steps: name and number of optimizer steps.
        every: steps between lines; the last step always has one.
        stream: where to write; None is standard output.
    """

    def __init__(self, stage: str, steps: int, every: int = 10, stream: TextIO | None = None):
        self.stage, self.steps, self.every = stage, steps, max(1, every)
        self._progress = Progress(stage, steps, unit="steps", stream=stream or sys.stdout, delay=0, interval=None)

    def __enter__(self) -> Console:
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, traceback)

    def step(self, row: Mapping, seconds_left: float, later: float = 0.0) -> None:
        """Show a training row of metrics.jsonl; what a line of 80 columns has no room for is in the file.

        Args:
            row: of metrics.
            seconds_left: estimate to the end of the stage.
            later: estimate for the stages after it.
        """
        self._progress.update(row["step"])
        if row["step"] % self.every == 0 or row["step"] == self.steps:
            mfu = f"  MFU {100 * row['mfu']:.0f} %" if "mfu" in row else ""
            rest = f", run {clock(seconds_left + later)}" if later else ""
            self.say(
                f"{self.stage} {row['step']}/{self.steps}  loss {row['loss']:.4g}  {row['tokens_per_s']:,.0f} "
                f"tokens/s{mfu}  ETA {clock(seconds_left)}{rest}"
            )

    def part(self, step: int, what: str, total: int, unit: str) -> Progress:
        """Return the progress of work between two steps.

        Args:
            step: how many are done.
            what: is done now.
            total, unit: of it.
        """
        return self._progress.part(f"{step}/{self.steps}  {what}", total, unit=unit)

    def evaluation(self, row: Mapping) -> None:
        """Show an evaluation row: its numbers by name."""
        skipped = ("step", "tokens", "time")
        numbers = [f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, (int, float)) and k not in skipped]
        against = f"  (teacher: {row['teacher']})" if "teacher" in row else ""
        self.say(f"{self.stage} {row['step']}/{self.steps}  {row['kind']}: {'  '.join(numbers)}{against}")

    def sample(self, row: Mapping) -> None:
        """Show a sample row: the beginning of what the student writes."""
        for each in row["samples"]:
            text = " ".join((each["prompt"] + each["student"]).split())
            before = f"{self.stage} {row['step']}/{self.steps}  writes: "
            self.say(before + shorten(text, max(79 - len(before), 8), placeholder=" ..."))

    def say(self, line: str) -> None:
        """Show a line of text."""
        self._progress.say(line)


def _repeated(row: dict, stage: str, step: int | None) -> bool:
    return row.get("stage") == stage and (step is None or row.get("step", 0) > step)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
