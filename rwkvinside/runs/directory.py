"""The run directory: who may write into it, and what is in it.

RUN/config.yaml       the resolved configuration
RUN/plan.txt          what each stage trains, freezes and needs
RUN/conversion.json   teacher, student, finished stages and their measurements
RUN/metrics.jsonl     one row for each step and evaluation (training/metrics.py)
RUN/stages/<stage>/   checkpoints (training/checkpoint.py)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import yaml

from ..config.schema import Config
from ..config.show import to_yaml
from ..errors import UserError
from ..stages.settings import StageConfig
from ..support.files import write_json, write_text
from ..training.metrics import FILE as METRICS

CONFIG, PLAN, CONVERSION = "config.yaml", "plan.txt", "conversion.json"


class RunDirectory:
    """One run on disk.

    Every process may read, one may write.

    Args:
        path: made when something is written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def claim(self, *, stage: str | None, resume: bool) -> None:
        """Refuse to touch what is not ours to overwrite; write nothing.

        Args:
            stage: the one stage to run, which may join a run that has not begun it; None: the whole run.
            resume: continue what is there.

        Raises:
            UserError: the directory is not empty, is not a run, or has nothing to resume.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output {self.path} is a file", "name a directory with --out")
        used = self.path.is_dir() and any(self.path.iterdir())
        if used and not (self.path / CONFIG).is_file():
            raise UserError(f"output directory {self.path} is neither empty nor a run", "name another one with --out")
        if resume and not used:
            raise UserError(f"there is no run to resume in {self.path}", "leave out --resume, or correct --out")
        if used and not resume and (stage is None or self.begun(stage)):
            what = "is not empty" if stage is None else f"has begun stage {stage} already"
            raise UserError(f"output directory {self.path} {what}", "go on with --resume, or name another with --out")

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

    def begun(self, stage: str) -> bool:
        """Return whether the stage has left anything."""
        folder = self.stage(stage)
        return stage in self.finished() or (folder.is_dir() and any(folder.iterdir()))

    def stage(self, name: str) -> Path:
        """Return where a stage keeps its checkpoints."""
        return self.path / "stages" / name

    def newest_checkpoint(self, stage: str) -> Path | None:
        """Return the directory of the last checkpoint of a stage.

        None where there is none.
        """
        from ..training.checkpoint import newest_checkpoint  # brings torch, which a report does without

        return newest_checkpoint(self.stage(stage))

    def config(self) -> dict:
        """Return the resolved configuration as plain values.

        It is what was written, perhaps by another version.

        Raises:
            UserError: it is missing, or not what was written.
        """
        file = self.path / CONFIG
        try:
            config = yaml.safe_load(file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"{self.path} is not a run directory: {CONFIG} is missing") from error
        except (ValueError, yaml.YAMLError) as error:
            raise UserError(f"{file} is damaged: {error}", "use another run directory") from error
        if not isinstance(config, dict):
            raise UserError(f"{file} is damaged: it is not a mapping of settings", "use another run directory")
        return config

    def finished(self) -> list[str]:
        """Return the names of finished stages in the order in which they ended."""
        return self.conversion().get("finished_stages", [])

    def conversion(self) -> dict:
        """Return the contents of conversion.json, {} before the first stage.

        Raises:
            UserError: it is not what was written.
        """
        file = self.path / CONVERSION
        if not file.exists():
            return {}
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{file} is damaged: {error}", "use another run directory") from error

    def describe(self, config: Config, plan: str) -> None:
        """Write config.yaml and plan.txt.

        Paths are made absolute so that they mean the same from everywhere.
        """
        data = config.data.model_copy(
            update={"train": [_absolute(p) for p in config.data.train], "val": [_absolute(p) for p in config.data.val]}
        )
        teacher = config.teacher.model_copy(update={"path": _absolute(config.teacher.path)})
        stages = {name: _absolute_stage(stage) for name, stage in config.stages.items()}
        absolute = config.model_copy(update={"data": data, "teacher": teacher, "stages": stages})
        write_text(self.path / CONFIG, to_yaml(absolute))
        write_text(self.path / PLAN, plan)

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


def _absolute_stage(stage: StageConfig) -> StageConfig:
    train, second, cache = stage.data.train, stage.teacher_model.path, stage.teacher_cache
    data = stage.data.model_copy(update={"train": train and [_absolute(path) for path in train]})
    model = stage.teacher_model.model_copy(update={"path": second and _absolute(second)})
    return stage.model_copy(update={"data": data, "teacher_model": model, "teacher_cache": cache and _absolute(cache)})


def _absolute(path: str) -> str:
    """Return a path of this machine made absolute; hub names stay."""
    return str(Path(path).resolve()) if Path(path).exists() else path
