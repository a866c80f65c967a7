"""metrics.jsonl and the console of a run. Writes what it is given; what the numbers mean is decided elsewhere."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import TextIO

import torch

from ..errors import UserError
from ..support.process_memory import peak_bytes
from .loggers import Logger

FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends rows to RUN/metrics.jsonl, one JSON object a line, each on the disk's way before the next step begins.

    Args:
        run: the run directory, made if need be.
        logger: mirrors every row; whoever opened it closes it.
    """

    def __init__(self, run: Path | str, logger: Logger | None = None):
        self.path = Path(run) / FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._logger = logger

    def write(self, row: dict) -> None:
        """Append a row; numbers that are not finite become null, which JSON has instead.

        Raises:
            UserError: no space.
        """
        row = _finite(row)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
        except OSError as error:
            raise self._unwritten(error) from error
        if self._logger is not None:
            self._logger.write(row)

    def begin(self, stage: str, step: int | None = None) -> None:
        """Forget what a run that starts or resumes a stage will write again.

        Rows of the stage after `step` go, with None all rows of the stage, and so does a last line that a killed
        process did not finish. Rows of other stages stay.

        Raises:
            UserError: no space.
        """
        if self._logger is not None:
            self._logger.begin(stage, step or 0)
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").split("\n")[:-1]
        kept = [line for line in lines if not _repeated(json.loads(line), stage, step)]
        temporary = self.path.with_name(f".{FILE}.writing")
        try:
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            temporary.replace(self.path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise self._unwritten(error) from error

    def _unwritten(self, error: OSError) -> UserError:
        return UserError(f"cannot write {self.path}: {error.strerror}", "free space, then continue with --resume")


class Console:
    """Progress of one stage: a line per interval, and on a terminal a live bar under it.

    Args:
        stage, steps: name and number of optimizer steps.
        every: steps between lines; the last step always has one.
        stream: where to; None is standard output.
    """

    def __init__(self, stage: str, steps: int, every: int = 10, stream: TextIO | None = None):
        self.stage, self.steps, self.every = stage, steps, max(1, every)
        self.stream = stream or sys.stdout
        self._progress = self._task = None

    def __enter__(self) -> Console:
        if self.stream.isatty():
            from rich.console import Console as Terminal
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            terminal = Terminal(file=self.stream, soft_wrap=True, highlight=False)
            self._progress = Progress(*columns, console=terminal, transient=True)
            self._task = self._progress.add_task(self.stage, total=self.steps)
            self._progress.start()
        return self

    def __exit__(self, *exc) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def step(self, row: dict, eta_s: float) -> None:
        """Show a training row of metrics.jsonl; `eta_s` is the estimated time to the end of the stage in seconds."""
        if self._progress is not None:
            self._progress.update(self._task, completed=row["step"])
        if row["step"] % self.every == 0 or row["step"] == self.steps:
            mfu = f"  MFU {100 * row['mfu']:.1f} %" if "mfu" in row else ""
            self.say(
                f"{self.stage} {row['step']}/{self.steps}  loss {row['loss']:.4g}  lr {row['lr']:.2e}  "
                f"grad {row['grad_norm']:.3g}  {row['tokens_per_s']:.0f} tokens/s{mfu}  "
                f"{row['memory_mb']:.0f} MB  ETA {_clock(eta_s)}"
            )

    def evaluation(self, row: dict) -> None:
        """Show an evaluation row: its numbers by name."""
        skipped = ("step", "tokens", "time")
        numbers = [f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, (int, float)) and k not in skipped]
        self.say(f"{self.stage} {row['step']}/{self.steps}  {row['kind']}: {'  '.join(numbers)}")

    def say(self, line: str) -> None:
        """One line of text."""
        if self._progress is not None:
            self._progress.console.print(line, markup=False)
        else:
            self.stream.write(line + "\n")
            self.stream.flush()


def memory_mb(device: torch.device) -> float:
    """Peak memory in MB (1e6 bytes): of the CUDA allocator, elsewhere the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return peak_bytes() / 1e6


class Throughput:
    """Tokens per second and time to go, over the steps of this process only (a resumed run starts afresh)."""

    def __init__(self):
        self._mark = time.perf_counter()
        self._mean: float | None = None

    def mark(self) -> None:
        """A step begins: time since the last one (evaluation, checkpoint) does not count."""
        self._mark = time.perf_counter()

    def step(self, tokens: int, steps_left: int) -> tuple[float, float]:
        """The step that began at `mark` is done: its tokens/s, and the estimated seconds for the steps left."""
        seconds = max(time.perf_counter() - self._mark, 1e-9)
        self._mean = seconds if self._mean is None else 0.9 * self._mean + 0.1 * seconds
        return tokens / seconds, self._mean * steps_left


def _repeated(row: dict, stage: str, step: int | None) -> bool:
    return row.get("stage") == stage and (step is None or row.get("step", 0) > step)


def _finite(value):
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
