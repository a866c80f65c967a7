"""What a run directory says of a run, in the form in which people are shown it.

Reads files, and draws and prints nothing. A run that is not finished, or that an earlier version made, has less.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median

import yaml

from ..errors import UserError
from ..runs.directory import CONFIG, RunDirectory
from ..runs.metrics_file import of_kind, read_metrics, stages, tokens_before

EVALUATION = "eval.json"  # in the run directory: what `rwkvinside eval RUN --json RUN/eval.json` has written


@dataclass(frozen=True)
class ScoreRow:
    """A line of the table of scores.

    Attributes:
        name: "teacher", "control" or the stage after which the student was measured.
        kl, ce, agreement: on validation data; None where that was not measured.
        against: with which model the student was compared, "" is the original.
    """

    name: str
    kl: float | None
    ce: float | None
    agreement: float | None
    against: str = ""


@dataclass(frozen=True)
class StageCost:
    """What a stage took, and what the plan said of it.

    Attributes:
        name: of the stage.
        tokens: that it read; those of a stage that is computed at once, too.
        seconds: of its training steps; None of a stage that is computed at once.
        tokens_per_s, mfu: median of its steps.
        memory: most bytes that were measured.
        planned: bytes that the plan had said; None where there is no plan in numbers.
    """

    name: str
    tokens: int
    seconds: float | None
    tokens_per_s: float | None
    mfu: float | None
    memory: float | None
    planned: int | None


@dataclass(frozen=True)
class RunFacts:
    """A run as its directory describes it.

    Attributes:
        path: the run directory.
        rows: of metrics.jsonl.
        config, conversion, forecast: of the files of these names, {} where there are none.
        evaluation: the JSON of `rwkvinside eval`, {} where there is none.
    """

    path: Path
    rows: list[dict]
    config: dict
    conversion: dict
    forecast: dict
    evaluation: dict

    @property
    def name(self) -> str:
        """Name of the directory."""
        return self.path.resolve().name

    @property
    def teacher(self) -> str:
        """Path or hub id of the teacher; "" where nothing says it."""
        return self.conversion.get("teacher") or self.config.get("teacher", {}).get("path", "")

    @property
    def teacher_identity(self) -> str:
        """What tells the teacher from another one, wherever it lies; its path where an earlier version made the run."""
        identity = RunDirectory(self.path).records.identity()
        return self.teacher if identity is None else json.dumps(identity.teacher, sort_keys=True)

    @property
    def settings(self) -> str:
        """The whole configuration as YAML."""
        return yaml.safe_dump(self.config, sort_keys=False) if self.config else ""

    @property
    def layers(self) -> list[dict]:
        """The layers of the student, see `Forecast.layers`; [] where nothing says it."""
        if self.forecast:
            return list(self.forecast["layers"])
        student = self.conversion.get("student", {})
        kept = set(range(student.get("teacher.num_hidden_layers", 0))) - set(student.get("rwkv_layers", ()))
        count = student.get("teacher.num_hidden_layers", 0)
        window = {"window": student["window"], "sinks": student["sinks"]} if student.get("window") else {}
        return [{"kind": "attention"} if i in kept else {"kind": "rwkv", **window} for i in range(count)]

    @cached_property
    def scores(self) -> list[ScoreRow]:
        """Teacher, control and student after each stage; [] without an evaluation."""
        measured = {stage: of_kind(self.rows, "eval", stage)[-1] for stage in stages(self.rows, "eval")}
        if not measured:
            return []
        found = []
        teacher = next((row["ce_teacher"] for row in reversed(measured.values()) if "ce_teacher" in row), None)
        if teacher is not None:
            found.append(ScoreRow("teacher", 0.0, teacher, 1.0))
        if controls := of_kind(self.rows, "control"):
            found.append(_scores("control", controls[-1]))
        return found + [_scores(stage, row) for stage, row in measured.items()]

    @property
    def final(self) -> ScoreRow | None:
        """The student after the last stage that was measured."""
        return self.scores[-1] if self.scores else None

    @property
    def early_ends(self) -> list[str]:
        """A sentence for each stage that ended before its last step."""
        return [
            f"{name} ended early, at step {end['step']:,} of {end['steps']:,}: {end['reason']}"
            for name, end in self.conversion.get("early_ends", {}).items()
        ]

    @cached_property
    def costs(self) -> list[StageCost]:
        """What each stage took, in the order of the run."""
        planned = {stage["name"]: stage for stage in self.forecast.get("stages", ())}
        names = list(dict.fromkeys(row["stage"] for row in self.rows if "stage" in row))
        return [self._cost(name, planned.get(name, {})) for name in names]

    def _cost(self, stage: str, planned: dict) -> StageCost:
        train = of_kind(self.rows, "train", stage)
        read = max((row.get("tokens", 0) for row in self.rows if row.get("stage") == stage), default=0)
        before, seconds = 0, 0.0
        for row in train:
            seconds += (row.get("tokens", 0) - before) / row["tokens_per_s"] if row.get("tokens_per_s") else 0.0
            before = row.get("tokens", 0)
        return StageCost(
            name=stage,
            tokens=read,
            seconds=seconds or None,
            tokens_per_s=_median(train, "tokens_per_s"),
            mfu=_median(train, "mfu"),
            memory=max((1e6 * row["memory_mb"] for row in train if row.get("memory_mb")), default=None),
            planned=planned.get("peak"),
        )

    @property
    def tokens(self) -> int:
        """Tokens that all stages read."""
        return sum(cost.tokens for cost in self.costs)

    @property
    def seconds(self) -> float | None:
        """From the first measurement to the last, pauses of an interrupted run included; None without times."""
        times = [row["time"] for row in self.rows if isinstance(row.get("time"), (int, float))]
        return max(times) - min(times) if len(times) > 1 else None

    @property
    def samples(self) -> list[dict]:
        """The last texts of student and teacher, see `WriteSamples`."""
        found = of_kind(self.rows, "sample")
        return found[-1]["samples"] if found else []

    @property
    def tokens_before(self) -> dict[str, int]:
        """Tokens read before each stage began."""
        return tokens_before(self.rows)

    @property
    def next_commands(self) -> list[tuple[str, str]]:
        """What one does with a finished run: command and what for."""
        run = shlex.quote(str(self.path))
        export = shlex.quote(f"{str(self.path).rstrip('/')}-hf")
        fresh = self.config.get("teacher", {}).get("fresh")  # a model from nothing has no teacher to talk to
        teacher = f" --teacher {shlex.quote(self.teacher)}" if self.teacher and not fresh else ""
        file = shlex.quote(f"{str(self.path).rstrip('/')}.gguf")
        is_for_llama_cpp = self.config.get("student", {}).get("preset") == "arwkv7"
        return [
            (f"rwkvinside report {run}", "a page of all that was measured"),
            (f"rwkvinside chat {run}{teacher}", "talk to both, side by side"),
            (f"rwkvinside export {run} --to hf --out {export}", "for transformers"),
            *([(f"rwkvinside export {run} --to gguf --out {file}", "for llama.cpp")] if is_for_llama_cpp else []),
        ]

    @property
    def repeat_commands(self) -> list[str]:
        """What makes the same run again, and what was measured on it."""
        run, export = shlex.quote(str(self.path)), shlex.quote(f"{str(self.path).rstrip('/')}-hf")
        commands = [f"rwkvinside train -c {shlex.quote(str(self.path / CONFIG))} --out NEW"] if self.config else []
        commands += [
            f"rwkvinside export {run} --to hf --out {export}",
            f"rwkvinside verify {export} --against {run}",
        ]
        val = self.config.get("data", {}).get("val") or ()
        data = " ".join(f"--data {shlex.quote(path)}" for path in val)
        if data:
            commands.append(f"rwkvinside eval {run} {data} --json {shlex.quote(str(self.path / EVALUATION))}")
        return commands


def run_facts(path: Path, evaluation: Path | None = None) -> RunFacts:
    """Read a run directory.

    Args:
        path: with a metrics.jsonl.
        evaluation: JSON of `rwkvinside eval`; None is eval.json in the run directory, where there is one.

    Raises:
        UserError: no metrics, or a file that is not what was written.
    """
    directory = RunDirectory(path)
    if not directory.metrics.is_file():
        raise directory.without(directory.metrics.name)
    rows = read_metrics(directory.metrics)
    config = directory.config() if (path / CONFIG).is_file() else {}
    return RunFacts(path, rows, config, directory.conversion(), directory.forecast(), _evaluation(path, evaluation))


def _evaluation(path: Path, given: Path | None) -> dict:
    file = given or path / EVALUATION
    if given is None and not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(found, dict) and (found.get("by_position") or found.get("recall")):
            return found
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{file} is not an evaluation: {reason}", "`rwkvinside eval --json` writes one") from error
    raise UserError(f"{file} is not an evaluation", "`rwkvinside eval --json` writes one")


def _scores(name: str, row: dict) -> ScoreRow:
    return ScoreRow(name, row.get("kl"), row.get("ce"), row.get("agreement"), row.get("teacher", ""))


def _median(rows: Sequence[dict], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return median(values) if values else None
