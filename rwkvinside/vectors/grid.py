"""Many runs from one plan: a deterministic list, run in order or several at once, resumed where it was stopped.

A plan is a YAML file: `settings` of all runs, and groups of entries. An entry has settings of its own and

    vary + count     so many of all combinations of the values, drawn by the entry's name
    seeds            one run for each seed
    select: n        the settings of the best run of each of the n best architectures so far
    ensemble: n      no training: the n best runs of different architectures so far, `weighted` or not
    members: [name]  the ensemble of these entries instead
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import groupby, product
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from ..config.load import check_section, merge_settings, read_settings
from ..errors import Interrupted, UserError
from ..support.files import write_json
from ..support.sealed import digest_of
from ..support.settings import Positive, Section
from .baselines import evaluate_baselines
from .data import load_data, split
from .run import read_config, read_result, write_ensemble
from .settings import RunConfig, checked
from .train import train

FAILED, BASELINES = "failed.json", "baselines.json"


class Entry(Section):
    """Runs of a plan that belong together."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="Beginning of the runs' names.")
    settings: dict[str, Any] = Field({}, description="Of these runs, over those of the plan.")
    vary: dict[str, list[Any]] = Field({}, description="Values by path, such as model.layers.")
    count: Positive | None = Field(None, description="Combinations that are drawn; null: all.")
    seeds: tuple[int, ...] = Field((0,), description="A run for each.")
    select: Positive | None = Field(None, description="Settings of the best runs so far.")
    ensemble: Positive | None = Field(None, description="Best runs that vote.")
    members: tuple[str, ...] = Field((), description="Entries that vote.")
    weighted: bool = Field(False, description="Votes count by validation cosine.")


class Group(Section):
    """A stage of a plan."""

    name: str = Field(description="Of the stage.")
    entries: tuple[Entry, ...] = Field(description="Its runs.")


class Plan(Section):
    """A plan."""

    settings: dict[str, Any] = Field({}, description="Of all runs.")
    groups: tuple[Group, ...] = Field(description="In order.")


@dataclass(frozen=True)
class PlannedRun:
    """A run of a plan.

    Attributes:
        group, entry, name: where it comes from, and what it is called.
        settings: known ones; of a selected run those over the selected ones.
        kind: "train", "select" or "ensemble".
        place: which of the best it takes, from 0 (select), or how many (ensemble).
        members, weighted: see `Entry`.
    """

    group: str
    entry: str
    name: str
    settings: dict
    kind: str = "train"
    place: int = 0
    members: tuple[str, ...] = ()
    weighted: bool = False


@dataclass
class Outcome:
    """What has become of a plan's runs.

    Attributes:
        finished: directories by name.
        trained: those among them whose settings were in the plan, of which the best are selected.
        failed: the reason by name.
    """

    finished: dict[str, Path] = field(default_factory=dict)
    trained: dict[str, Path] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def read_plan(file: Path, overrides: Sequence[Mapping] = ()) -> list[PlannedRun]:
    """Return the runs of a plan, in order.

    Args:
        file: YAML.
        overrides: settings of all runs, over the file's.

    Raises:
        UserError: it is no plan.
    """
    (values,) = read_settings([file])
    plan = check_section(Plan, values, source=str(file), hint="see docs/vectors.md for the form of a plan")
    runs = [
        run
        for group in plan.groups
        for entry in group.entries
        for run in _runs(group.name, entry, [plan.settings, entry.settings, *overrides])
    ]
    names = [run.name for run in runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{file}: two runs are named {twice[0]}", "give entries different names")
    return runs


def _runs(group: str, entry: Entry, layers: Sequence[Mapping]) -> list[PlannedRun]:
    settings = merge_settings([dict(layer) for layer in layers])
    count = entry.count or 1
    if entry.ensemble or entry.members:
        place = entry.ensemble or len(entry.members)
        return [
            PlannedRun(group, entry.name, entry.name, settings, "ensemble", place, entry.members, entry.weighted),
        ]
    if entry.select:
        return [
            PlannedRun(group, entry.name, f"{entry.name}{place + 1}-seed{seed}", {"seed": seed}, "select", place)
            for place in range(entry.select)
            for seed in entry.seeds
        ]
    combinations = [dict(zip(entry.vary, values, strict=True)) for values in product(*entry.vary.values())]
    if entry.count is not None:
        if entry.count > len(combinations):
            raise UserError(
                f"{entry.name}: count={entry.count} of {len(combinations)} combinations", "vary more, or count fewer"
            )
        combinations = random.Random(entry.name).sample(combinations, count)
    runs = []
    for number, combination in enumerate(combinations, 1):
        for seed in entry.seeds:
            name = entry.name + (f"-{number}" if len(combinations) > 1 else "")
            name += f"-seed{seed}" if len(entry.seeds) > 1 else ""
            layered = [settings, *({path: value} for path, value in combination.items())]
            runs.append(PlannedRun(group, entry.name, name, _nested(layered) | {"seed": seed}))
    return runs


def _nested(layers: Sequence[Mapping]) -> dict:
    """Return settings in which paths such as model.layers have become sections."""
    sections = []
    for layer in layers:
        for path, value in layer.items():
            for key in reversed(path.split(".")):
                value = {key: value}
            sections.append(value)
    return merge_settings(sections)


@dataclass(frozen=True)
class Task:
    """A run that is to be made.

    Attributes:
        run: of the plan.
        folder: where.
        settings: of the run; of an ensemble its members.
    """

    run: PlannedRun
    folder: Path
    settings: dict


@dataclass(frozen=True)
class Failure:
    """What went wrong with a run."""

    error: str
    traceback: str


def run_plan(
    runs: Sequence[PlannedRun], out: Path, say: Callable[[str], None], most: int | None = None, jobs: int = 1
) -> Outcome:
    """Run what is not finished yet.

    A run that fails is recorded with its traceback, and tried again the next time.

    Args:
        runs: of the plan.
        out: directory of all runs.
        say: where lines for people go.
        most: runs that are made; None: all.
        jobs: runs that are made at once, each in a process with its share of the threads.
    """
    outcome, left = Outcome(), len(runs) if most is None else most
    numbers = {run.name: f"[{number}/{len(runs)}] {run.group}: {run.name}" for number, run in enumerate(runs, 1)}
    for _, together in groupby(runs, key=lambda run: run.kind):  # what selects or votes needs the runs before it
        tasks = []
        for run in together:
            try:
                task = Task(run, *_place(run, out, outcome))
                if read_result(task.folder) is not None:
                    _finished(task, out, outcome)
                elif left > 0:
                    tasks.append(task)
                    left -= 1
            except UserError as error:
                _failed(run, Failure(str(error), traceback.format_exc()), out, outcome, say)
        for task, failure in _made(tasks, jobs, lambda run: say(numbers[run.name])):
            if failure is None:
                _finished(task, out, outcome)
            else:
                _failed(task.run, failure, out, outcome, say)
    return outcome


def _made(
    tasks: Sequence[Task], jobs: int, begin: Callable[[PlannedRun], None]
) -> Iterator[tuple[Task, Failure | None]]:
    """Make runs and yield each with what went wrong; `begin` is called with each of them."""
    if jobs == 1 or len(tasks) < 2 or tasks[0].run.kind == "ensemble":
        for task in tasks:
            begin(task.run)
            yield task, _make(task)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin_process, (threads,))
    waiting, running = list(tasks), {}
    with pool:  # at an interrupt it waits for those that train, which have been told, too, and save what they have
        while waiting or running:
            while waiting and len(running) < jobs:  # no more than that: what the pool has taken in cannot be stopped
                task = waiting.pop(0)
                running[pool.submit(_make, task)] = task
            for each in wait(running, return_when=FIRST_COMPLETED).done:
                task, failure = running.pop(each), each.result()
                begin(task.run)  # told when it is made: which ones are at work says little
                yield task, failure


def _begin_process(threads: int) -> None:
    """Prepare a process of the pool; lines of several runs would be mixed, so they are dropped."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - as long as the process
    torch.set_num_threads(threads)


def _make(task: Task) -> Failure | None:
    """Make a run, and return what went wrong (`Interrupted`: it was asked to stop)."""
    try:
        if task.run.kind == "ensemble":
            members = [task.folder.parent / name for name in task.settings["members"]]
            write_ensemble(task.folder, members, task.run.weighted)
        else:
            train(checked(RunConfig, task.settings | {"out": str(task.folder)}), lambda line: None)
    except Interrupted:
        raise
    except Exception as error:  # the other runs of the plan are worth having
        return Failure(str(error), traceback.format_exc())
    return None


def _finished(task: Task, out: Path, outcome: Outcome) -> None:
    name = task.run.name
    outcome.finished[name] = task.folder
    if task.run.kind == "train":
        outcome.trained[name] = task.folder
    (out / f"{name}-{FAILED}").unlink(missing_ok=True)


def _failed(run: PlannedRun, failure: Failure, out: Path, outcome: Outcome, say: Callable[[str], None]) -> None:
    first = failure.error.splitlines()[0] if failure.error else failure.traceback.splitlines()[-1]
    outcome.failed[run.name] = first
    record = {"run": run.name, "error": first, "traceback": failure.traceback}
    write_json(out / f"{run.name}-{FAILED}", record)
    say(f"{run.name} FAILED: {first}")


def _place(run: PlannedRun, out: Path, outcome: Outcome) -> tuple[Path, dict]:
    """Return the directory of a run and its settings, those of selected runs included."""
    settings = run.settings
    if run.kind == "select":
        best = _best(outcome.trained)
        if run.place >= len(best):
            raise UserError(f"{run.name} needs the best {run.place + 1} architectures, {len(best)} are finished")
        settings = read_config(best[run.place]).model_dump(mode="json") | run.settings
    if run.kind == "ensemble":
        settings = {"members": [path.name for path in _members(run, outcome)], "weighted": run.weighted}
    identity = digest_of({key: value for key, value in settings.items() if key != "out"})
    return out / f"{run.name}-{identity[:8]}", settings


def _members(run: PlannedRun, outcome: Outcome) -> list[Path]:
    if run.members:
        missing = [name for name in run.members if name not in outcome.finished]
        if missing:
            raise UserError(f"{run.name}: member {missing[0]} is not finished", "see why it failed")
        return [outcome.finished[name] for name in run.members]
    best = _best(outcome.finished)
    if len(best) < run.place:
        raise UserError(f"{run.name} needs {run.place} finished architectures, {len(best)} are")
    return best[: run.place]


def _best(runs: Mapping[str, Path]) -> list[Path]:
    """Return the best run of each architecture, the best architecture first."""
    best: dict[str, tuple[float, Path]] = {}
    for folder in runs.values():
        result = read_result(folder)
        if result is None or result["arch"] == "ensemble":
            continue
        cosine = result["metrics"]["cosine"]
        if cosine > best.get(result["arch"], (-2.0, folder))[0]:
            best[result["arch"]] = (cosine, folder)
    return [folder for _, folder in sorted(best.values(), key=lambda each: (-each[0], str(each[1])))]


def write_baselines(runs: Sequence[PlannedRun], out: Path, say: Callable[[str], None]) -> None:
    """Compute the baselines of every data set of a plan that has none yet, into OUT/baselines.json."""
    path = out / BASELINES
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for run in runs:
        if run.kind != "train":
            continue
        data = checked(RunConfig, run.settings).data
        key = digest_of(data.model_dump(mode="json", exclude={"limit"}))
        if key not in known:
            loaded = load_data(data)
            say(f"baselines of {data.source}")
            rows = dict(evaluate_baselines(split(loaded, data)))
            known[key] = {"source": data.source, "digest": loaded.digest, "rows": rows}
            write_json(path, known)
