"""The run directory: who may write into it, and what is in it.

RUN/run.json          the run's id and its teacher's (records.py)
RUN/config.yaml       the resolved configuration
RUN/config.N.yaml     the ones it had before, the first is 1
RUN/plan.txt          what each stage trains, freezes and needs
RUN/plan.json         the same in numbers (planning/forecast.py)
RUN/conversion.json   teacher, student, finished stages and their measurements
RUN/metrics.jsonl     one row for each step and evaluation (training/metrics.py)
RUN/digests.json      digests of large files, so that they are read once (support/digests.py)
RUN/stages/<stage>/   the stage's record (records.py), checkpoints (training/checkpoint.py)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..config.schema import Config
from ..config.show import to_yaml
from ..errors import UserError
from ..stages.settings import StageConfig
from ..support.files import file_digest, write_json, write_text
from ..support.lock import entries
from ..support.names import ALLOWED, is_name
from ..support.sealed import digest_of
from ..training.metrics import FILE as METRICS
from .records import IDENTITY, RESTORE, Records, StageRecord

CONFIG, CONVERSION, DIGESTS = "config.yaml", "conversion.json", "digests.json"
PLAN, FORECAST = "plan.txt", "plan.json"
MOVABLE = ("out", "teacher.path")  # where things are; what the teacher is, its identity says


@dataclass(frozen=True)
class Change:
    """A setting that differs from the one that a run has.

    Attributes:
        key: its path in the configuration.
        was, now: the values, as JSON; None also where one of the two does not have it.
    """

    key: str
    was: object
    now: object

    def __str__(self) -> str:
        return f"{self.key} was {json.dumps(self.was)}, is {json.dumps(self.now)}"


class RunDirectory:
    """One run on disk.

    Every process may read, one may write.

    Args:
        path: made when something is written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.records = Records(self.path)

    def claim(self, *, stage: str | None, resume: bool) -> None:
        """Refuse to touch what is not ours to overwrite; write nothing.

        Args:
            stage: the one stage to run, which may join a run that has not begun it; None: the whole run.
            resume: continue what is there.

        Raises:
            UserError: the directory is not empty, is not a run, has nothing to resume, or an earlier version made it.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output {self.path} is a file", "name a directory with --out")
        used = self.path.is_dir() and bool(entries(self.path))
        if used and not (self.path / CONFIG).is_file() and not (self.path / IDENTITY).is_file():
            raise UserError(f"output directory {self.path} is neither empty nor a run", "name another one with --out")
        if resume and not used:
            raise UserError(f"there is no run to resume in {self.path}", "leave out --resume, or correct --out")
        if used and not resume and (stage is None or self.begun(stage)):
            what = "is not empty" if stage is None else f"has begun stage {stage} already"
            raise UserError(f"output directory {self.path} {what}", "go on with --resume, or name another with --out")
        if used and self.records.identity() is None:
            raise UserError(
                f"run {self.path} has no identity ({IDENTITY}): it was made by an older version of this program",
                "export and eval still read it; to train on, use that version, or begin a new run with --out",
            )

    @property
    def is_run(self) -> bool:
        """Whether this is a run and not a model directory.

        A run has a config.yaml, a model directory a config.json.
        """
        return (self.path / CONFIG).is_file() and not (self.path / "config.json").is_file()

    @property
    def metrics(self) -> Path:
        """The file of the metrics, see `runs.metrics_file`."""
        return self.path / METRICS

    def without(self, file: str) -> UserError:
        """Return the refusal of a directory in which a file is missing that a run has."""
        if self.path.is_file():
            return UserError(f"{self.path} is a file, not a run directory", "give the directory of the run")
        if (self.path / CONFIG).is_file():
            return UserError(f"run {self.path} has measured nothing yet: {file} is missing", "let it train first")
        cause = f"{self.path} is not a run directory: {file} is missing"
        return UserError(cause, "give the directory that --out named when the run began")

    def begun(self, stage: str) -> bool:
        """Return whether the stage has left anything."""
        folder = self.stage(stage)
        return stage in self.finished() or (folder.is_dir() and any(folder.iterdir()))

    def stage(self, name: str) -> Path:
        """Return where a stage keeps its checkpoints.

        Raises:
            UserError: the name leads elsewhere.
        """
        if not is_name(name):
            raise UserError(f"{self.path} has no stage {name!r}", ALLOWED)
        return self.path / "stages" / name

    def stages(self) -> list[str]:
        """Return the names of stages that have a folder."""
        folder = self.path / "stages"
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

    def newest_checkpoint(self, stage: str) -> Path | None:
        """Return the directory of the last checkpoint of a stage.

        None where there is none.

        Raises:
            UserError: the stage is finished, and did not end with it.
        """
        from ..training.checkpoint import STATE, newest_checkpoint  # brings torch, which a report does without

        newest = newest_checkpoint(self.stage(stage))
        record = self._record(stage)
        if record is not None and record.checkpoint is not None:
            name, folder = record.checkpoint, self.stage(stage)
            if newest is None or newest.name != name:
                raise UserError(f"stage {stage} of {self.path} ended with {name}, but {newest} is there", RESTORE)
            for one in filter(None, (name, record.best)):
                file = folder / one / STATE
                if not file.is_file() or file_digest(file) != record.files.get(f"{one}/{STATE}"):
                    raise UserError(f"{file} is not the one that stage {stage} ended with", RESTORE)
        return newest

    def checkpoint(self, stage: str, which: str = "last") -> Path | None:
        """Return the directory of a checkpoint of a stage.

        None where the stage has none.

        Args:
            stage: its name.
            which: "last", "best" of a finished stage on validation data, or the name of a checkpoint.

        Raises:
            UserError: there is no such checkpoint; see also `newest_checkpoint`.
        """
        from ..training.checkpoint import checkpoint_directories

        last = self.newest_checkpoint(stage)
        if last is None or which == "last":
            return last
        if which == "best":
            record = self._record(stage)
            return last if record is None or record.best is None else self.stage(stage) / record.best
        found = {path.name: path for path in checkpoint_directories(self.stage(stage))}
        if which not in found:
            raise UserError(
                f"stage {stage} of {self.path} has no checkpoint {which}", f"there are: best, last, {', '.join(found)}"
            )
        return found[which]

    def _record(self, stage: str) -> StageRecord | None:
        return self.records.stage(stage) if self.records.identity() is not None else None

    def config(self) -> dict:
        """Return the resolved configuration as plain values.

        It is what was written, perhaps by another version.

        Raises:
            UserError: it is missing, or not what was written.
        """
        return self._read_config(self.path / CONFIG)

    def config_of(self, stage: str) -> dict:
        """Return the configuration that a stage ran with last, as plain values.

        Where the run has no records it is the last one of the run.

        Raises:
            UserError: it was changed.
        """
        newest = self.config()
        if (record := self._record(stage)) is None:
            return newest
        for config in (newest, *map(self._read_config, reversed(self._earlier_configs()))):
            if settings_digest(config) == record.settings:
                return config
        raise UserError(f"{self.path / CONFIG} is not the configuration that stage {stage} was trained with", RESTORE)

    def _read_config(self, file: Path) -> dict:
        try:
            config = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise self.without(file.name) from error
        except (ValueError, yaml.YAMLError) as error:
            raise UserError(f"{file} is damaged: {error}", "use another run directory") from error
        if not isinstance(config, dict):
            raise UserError(f"{file} is damaged: it is not a mapping of settings", "use another run directory")
        return _as_it_was(config)

    def _earlier_configs(self) -> list[Path]:
        """Return the files of the configurations that the run had before, oldest first."""
        numbers = (re.fullmatch(r"config\.([0-9]+)\.yaml", path.name) for path in self.path.glob("config.*.yaml"))
        return [self.path / f"config.{n}.yaml" for n in sorted(int(match[1]) for match in numbers if match)]

    def changes(self, config: Config) -> list[Change]:
        """Return in which settings a configuration differs from the one that the run has.

        Where the run is does not count. None of a run that has not begun.
        """
        if not (self.path / CONFIG).is_file():
            return []
        was, now = (dict(flat_settings(values)) for values in (_with_defaults(self.config()), _plain(absolute(config))))
        keys = [key for key in dict.fromkeys([*now, *was]) if key != "out"]
        return [Change(key, was.get(key), now.get(key)) for key in keys if was.get(key) != now.get(key)]

    def step_tokens(self, config: Config) -> dict[str, int]:
        """Return the tokens of a step that the run has, by stage, for where a configuration leaves them out.

        Those of stages that have begun, or are as long as they were. {} of a run that has not begun.
        """
        was = dict(flat_settings(self.config())) if (self.path / CONFIG).is_file() else {}
        found = {}
        for name, stage in config.stages.items():
            tokens, *length = (was.get(f"stages.{name}.{key}") for key in ("batch.tokens", "tokens", "data.seq_len"))
            if isinstance(tokens, int) and (self.begun(name) or length == [stage.tokens, stage.data.seq_len]):
                found[name] = tokens
        return found

    def finished(self) -> list[str]:
        """Return the names of finished stages in the order in which they ended.

        Raises:
            UserError: a stage's record does not say so too, see `Records.finished`.
        """
        names = self.conversion().get("finished_stages", [])
        if not isinstance(names, list) or not all(map(is_name, names)):
            raise UserError(f"{self.path / CONVERSION} is damaged: its finished_stages are {names!r}", RESTORE)
        if self.records.identity() is not None:
            for name in names:
                self.records.finished(name)
        return names

    def conversion(self) -> dict:
        """Return the contents of conversion.json, {} before the first stage.

        Raises:
            UserError: it is not what was written.
        """
        return self._read_json(self.path / CONVERSION)

    def _read_json(self, file: Path) -> dict:
        if not file.exists():
            return {}
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{file} is damaged: {error}", "use another run directory") from error
        if not isinstance(values, dict):
            raise UserError(f"{file} is damaged: it is not a JSON object", "use another run directory")
        return values

    def describe(self, config: Config, plan: str, forecast: Mapping) -> None:
        """Write config.yaml, plan.txt and plan.json; a configuration that the run had before is kept as config.N.yaml.

        Paths are made absolute so that they mean the same from everywhere.
        """
        file, text = self.path / CONFIG, to_yaml(absolute(config))
        old = file.read_text(encoding="utf-8") if file.exists() else text
        earlier = self._earlier_configs()
        kept = bool(earlier) and earlier[-1].read_text(encoding="utf-8") == old
        if old != text and not kept:
            number = int(earlier[-1].name.split(".")[1]) + 1 if earlier else 1
            write_text(self.path / f"config.{number}.yaml", old)
        write_text(file, text)
        write_text(self.path / PLAN, plan)
        write_json(self.path / FORECAST, dict(forecast))

    def forecast(self) -> dict:
        """Return the numbers of the plan, {} where there are none: an earlier version made the run.

        Raises:
            UserError: they are damaged.
        """
        return self._read_json(self.path / FORECAST)

    def note(self, facts: Mapping, *, finished: str | None = None, evaluation: Mapping | None = None) -> None:
        """Update conversion.json.

        Args:
            facts: about the run.
            finished: a stage that has ended.
            evaluation: its last one.
        """
        conversion = self.conversion() | dict(facts)
        stages = [name for name in conversion.get("finished_stages", []) if name != finished]
        conversion["finished_stages"] = stages + ([finished] if finished else [])
        if finished and evaluation:
            conversion.setdefault("evaluations", {})[finished] = dict(evaluation)
        write_json(self.path / CONVERSION, conversion)


def settings_digest(config: Mapping) -> str:
    """Return a digest of a configuration, of plain values.

    Where the run and the teacher are does not count, nor does what `_as_it_was` adds.
    """
    settings = {key: value for key, value in flat_settings(config) if key not in MOVABLE}
    return digest_of({key: value for key, value in settings.items() if (key, value) != ("student.window_mix", "sum")})


def absolute(config: Config) -> Config:
    """Return a configuration whose paths mean the same from everywhere."""
    data = config.data.model_copy(
        update={"train": [_absolute(p) for p in config.data.train], "val": [_absolute(p) for p in config.data.val]}
    )
    teacher = config.teacher.model_copy(update={"path": _absolute(config.teacher.path)})
    stages = {name: _absolute_stage(stage) for name, stage in config.stages.items()}
    return config.model_copy(update={"data": data, "teacher": teacher, "stages": stages})


def _plain(config: Config) -> dict:
    """Return what `RunDirectory.config` finds after `describe`."""
    return yaml.safe_load(to_yaml(config))


def _as_it_was(written: dict) -> dict:
    """Return a configuration with what it meant when it was written, where a field's default is another one now."""
    student = written.get("student")
    if isinstance(student, dict) and student.get("window") and "window_mix" not in student:
        return written | {"student": student | {"window_mix": "sum"}}
    return written


def _with_defaults(written: dict) -> dict:
    """Return a configuration with the defaults of fields that did not exist when it was written.

    One that this version does not understand stays as it is.
    """
    try:
        return _plain(Config.model_validate(written))
    except ValueError:
        return written


def flat_settings(values: Mapping, at: str = "") -> Iterator[tuple[str, object]]:
    """Yield the values of nested mappings by path, a.b.c."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat_settings(value, f"{at}{key}.")
        else:
            yield f"{at}{key}", value


def _absolute_stage(stage: StageConfig) -> StageConfig:
    train, second, cache = stage.data.train, stage.teacher_model.path, stage.teacher_cache
    data = stage.data.model_copy(update={"train": train and [_absolute(path) for path in train]})
    model = stage.teacher_model.model_copy(update={"path": second and _absolute(second)})
    return stage.model_copy(update={"data": data, "teacher_model": model, "teacher_cache": cache and _absolute(cache)})


def _absolute(path: str) -> str:
    """Return a path of this machine made absolute; hub names stay."""
    return str(Path(path).resolve()) if Path(path).exists() else path
