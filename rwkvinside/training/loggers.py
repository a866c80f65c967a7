"""Trackers that mirror the rows of metrics.jsonl, which stays the one source. Each is an extra of the installation.

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
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from ..errors import UserError
from ..support.files import write_json

IDENTITY = "loggers.json"  # in the run directory: under which name trackers know the run
PROJECT = "rwkvinside"


class Logger(Protocol):
    """Where rows go besides metrics.jsonl."""

    def begin(self, stage: str, step: int) -> None:
        """A stage starts, or goes on after `step` steps: rows after it that were sent before are sent again."""
        ...

    def write(self, row: Mapping) -> None:
        """A row of the stage that was begun last, as it stands in metrics.jsonl."""
        ...

    def close(self) -> None:
        """Everything is sent."""
        ...


def check_loggers(names: Sequence[str]) -> None:
    """Refuse loggers whose package is not installed.

    Raises:
        UserError: names the first one and how to install it.
    """
    for name in names:
        found = find_spec(name)
        if found is None or found.origin is None:  # without an origin: a folder of that name, such as wandb's own
            raise UserError(
                f"loggers: {name} is not installed",
                f"pip install 'rwkvinside[{name}]', or leave {name} out of loggers",
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
        """Start them, if that was not done; the run directory exists by now.

        Raises:
            UserError: a logger does not start.
        """
        for name in self._names[len(self._opened) :]:
            self._opened.append(LOGGERS[name](self._run, self._settings))

    def begin(self, stage: str, step: int) -> None:
        for each in self._opened:
            each.begin(stage, step)

    def write(self, row: Mapping) -> None:
        for each in self._opened:
            each.write(row)

    def close(self) -> None:
        while self._opened:
            self._opened.pop().close()


class TensorBoard:
    """Event files, one folder for each stage, so that TensorBoard shows the stages as runs with the same tags."""

    def __init__(self, run: Path, settings: Mapping):
        self._folder = run / "tensorboard"
        self._writer = None

    def begin(self, stage: str, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.close()
        self._writer = SummaryWriter(str(self._folder / stage), purge_step=step + 1 if step else 0)

    def write(self, row: Mapping) -> None:
        for name, value in scalars(row).items():
            self._writer.add_scalar(name, value, row["step"], walltime=row["time"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Wandb:
    """One run of Weights & Biases for the whole conversion; its own variables (WANDB_MODE, WANDB_PROJECT) count."""

    def __init__(self, run: Path, settings: Mapping):
        import wandb

        project = os.environ.get("WANDB_PROJECT", PROJECT)
        own = run_identity(run)
        try:
            self._run = wandb.init(
                project=project, name=run.name, id=own, resume="allow", dir=str(run), config=dict(settings)
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"loggers: wandb does not start: {reason}",
                "wandb login, or WANDB_MODE=offline to work without network, or leave wandb out of loggers",
            ) from error

    def begin(self, stage: str, step: int) -> None:
        self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def write(self, row: Mapping) -> None:
        self._run.log(_named(row))

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """One run of Trackio for the whole conversion."""

    def __init__(self, run: Path, settings: Mapping):
        import trackio

        name = f"{run.name}-{run_identity(run)}"  # by which Trackio finds it again
        self._run = trackio.init(project=PROJECT, name=name, resume="allow", config=dict(settings), embed=False)

    def begin(self, stage: str, step: int) -> None:
        """Trackio has no axes to declare."""

    def write(self, row: Mapping) -> None:
        self._run.log(_named(row))

    def close(self) -> None:
        self._run.finish()


LOGGERS = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def scalars(row: Mapping) -> dict[str, float]:
    """The numbers of a row by tag: loss, layers/3, eval/kl. What was not finite (null) is left out."""
    prefix = "" if row["kind"] == "train" else f"{row['kind']}/"
    found = {}
    for name, value in row.items():
        if name in ("kind", "stage", "step", "time"):
            continue
        entries = value.items() if isinstance(value, Mapping) else [(None, value)]
        for key, number in entries:
            if isinstance(number, (int, float)):
                found[prefix + (name if key is None else f"{name}/{key}")] = number
    return found


def run_identity(run: Path) -> str:
    """The id of a run in trackers: drawn once, kept in the run directory.

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
    """A row for trackers that have one list of names for all stages."""
    return {f"{row['stage']}/{name}": value for name, value in (scalars(row) | {"step": row["step"]}).items()}
