"""Trackers that mirror the rows of metrics.jsonl, which stays the one source.

Each is an extra of the installation.

| logger | where | x axis | when a run is resumed |
|---|---|---|---|
| tensorboard | RUN/tensorboard/<stage>/ | steps of the stage | steps that are done again replace the old ones |
| wandb | the user's account or WANDB_MODE=offline | <stage>/step | the same run goes on |
| trackio | trackio's own folder | <stage>/step, or rows sent | the same run goes on |
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..errors import UserError
from ..support.files import write_json

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

IDENTITY = "loggers.json"  # in the run directory: under which name trackers know the run
PROJECT = "rwkvinside"


class Logger(Protocol):
    """A place where rows go in addition to metrics.jsonl."""

    def begin(self, stage: str, step: int) -> None:
        """Start a stage, or go on after `step` steps.

        Rows of later steps that were sent before are sent again.
        """
        ...

    def write(self, row: Mapping) -> None:
        """Send a row of the stage that was begun last, as it is in metrics.jsonl."""
        ...

    def close(self) -> None:
        """Wait until everything is sent."""
        ...


def check_loggers(names: Sequence[str]) -> None:
    """Refuse loggers whose package is not installed.

    Raises:
        UserError: names the first one and how to install it.
    """
    for name in names:
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # without an origin: a folder of that name, such as wandb's own
            raise UserError(
                f"loggers: {name} is not installed",
                f"pip install {name}, or leave {name} out of loggers",
            )


class Loggers:
    """All loggers of a run, on the one process that writes.

    Args:
        names: of `LOGGERS`.
        run: the run directory; a run that is resumed finds its identity there.
        settings: the resolved configuration as JSON values.

    Raises:
        UserError: a package is missing.
    """

    def __init__(self, names: Sequence[str], run: Path | str, settings: Mapping):
        check_loggers(names)
        self._names, self._run, self._settings = tuple(names), Path(run).resolve(), dict(settings)
        self._opened: list[Logger] = []

    def open(self) -> None:
        """Start them, if that was not done; the run directory must exist.

        Raises:
            UserError: a logger does not start.
        """
        for name in self._names[len(self._opened) :]:
            self._opened.append(LOGGERS[name](self._run, self._settings))

    def begin(self, stage: str, step: int) -> None:
        """Start a stage in all of them."""
        for logger in self._opened:
            logger.begin(stage, step)

    def write(self, row: Mapping) -> None:
        """Send a row to all of them."""
        for logger in self._opened:
            logger.write(row)

    def close(self) -> None:
        """Close all of them."""
        while self._opened:
            self._opened.pop().close()


class TensorBoard:
    """Event files, one folder for each stage.

    TensorBoard then shows the stages as runs with the same tags.
    """

    def __init__(self, run: Path, settings: Mapping):
        self._folder = run / "tensorboard"
        self._writer: SummaryWriter | None = None

    def begin(self, stage: str, step: int) -> None:
        """Open the files of a stage, dropping steps that are done again."""
        from torch.utils.tensorboard import SummaryWriter

        self.close()
        self._writer = SummaryWriter(str(self._folder / stage), purge_step=step + 1 if step else 0)

    def write(self, row: Mapping) -> None:
        """Write the numbers of a row."""
        if self._writer is None:
            raise RuntimeError("no stage was begun")
        for name, value in scalars(row).items():
            self._writer.add_scalar(name, value, row["step"], walltime=row["time"])

    def close(self) -> None:
        """Close the files of the stage."""
        if self._writer is not None:
            self._writer.close()


class Wandb:
    """One run of Weights & Biases for the whole conversion.

    Its own variables (WANDB_MODE, WANDB_PROJECT) count.
    """

    def __init__(self, run: Path, settings: Mapping):
        import wandb

        project = os.environ.get("WANDB_PROJECT", PROJECT)
        identity = run_identity(run)
        try:
            self._run = wandb.init(
                project=project, name=run.name, id=identity, resume="allow", dir=str(run), config=dict(settings)
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"loggers: wandb does not start: {reason}",
                "wandb login, or WANDB_MODE=offline to work without network, or leave wandb out of loggers",
            ) from error

    def begin(self, stage: str, step: int) -> None:
        """Give the stage an x axis."""
        self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def write(self, row: Mapping) -> None:
        """Send a row."""
        self._run.log(_named(row))

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class Trackio:
    """One run of Trackio for the whole conversion."""

    def __init__(self, run: Path, settings: Mapping):
        import trackio

        name = f"{run.name}-{run_identity(run)}"  # by which Trackio finds it again
        self._run = trackio.init(project=PROJECT, name=name, resume="allow", config=dict(settings), embed=False)

    def begin(self, stage: str, step: int) -> None:
        """Do nothing: Trackio has no axes to declare."""

    def write(self, row: Mapping) -> None:
        """Send a row."""
        self._run.log(_named(row))

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


LOGGERS: dict[str, Callable[[Path, Mapping], Logger]] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def scalars(row: Mapping) -> dict[str, float]:
    """Return the numbers of a row by tag: loss, layers/3, eval/kl.

    What was not finite (null) is left out.
    """
    prefix = "" if row["kind"] == "train" else f"{row['kind']}/"
    numbers = {}
    for name, value in row.items():
        if name in ("kind", "stage", "step", "time"):
            continue
        entries = value.items() if isinstance(value, Mapping) else [(None, value)]
        for key, number in entries:
            if isinstance(number, (int, float)):
                numbers[prefix + (name if key is None else f"{name}/{key}")] = number
    return numbers


def run_identity(run: Path) -> str:
    """Return the id of a run in trackers.

    It is drawn once and kept in the run directory.

    Raises:
        UserError: the file there is damaged, or cannot be written.
    """
    file = run / IDENTITY
    if file.exists():
        try:
            return json.loads(file.read_text(encoding="utf-8"))["id"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is damaged: {error}", "remove it: trackers then begin a new run") from error
    identity = uuid.uuid4().hex[:8]
    write_json(file, {"id": identity})
    return identity


def _named(row: Mapping) -> dict[str, float]:
    """Return a row's numbers for trackers with one list of names for all stages."""
    return {f"{row['stage']}/{name}": value for name, value in (scalars(row) | {"step": row["step"]}).items()}
