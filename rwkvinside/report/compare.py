"""Runs beside each other: what differs in their settings, their scores in one table, their curves over one another."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..runs.directory import flat_settings
from ..support.files import write_text
from ..support.progress import clock
from ..support.text import rounded_bytes, rounded_count
from .facts import RunFacts, run_facts
from .figures import runs_loss_figure, runs_validation_figure
from .page import Picture, describe, layer_cells, layer_kinds, number, render, share
from .tables import Rows, csv_text, loss_rows, validation_rows
from .write import FIGURES, write_pictures

PAGE, TABLE, LATEX = "compare.html", "compare.csv", "compare.tex"


@dataclass(frozen=True)
class Comparison:
    """Several runs.

    Attributes:
        runs: name -> what its directory says; names differ.
    """

    runs: dict[str, RunFacts]

    @property
    def differences(self) -> list[tuple[str, list[str]]]:
        """Settings that are not the same in all runs: the key, and the value in each run, "-" where it has none.

        Those of a stage are compared between the runs that run it; which stages each of them runs, `run` says.
        """
        settings = [_settings(facts.config) for facts in self.runs.values()]
        keys = [key for key in dict.fromkeys(itertools.chain(*settings)) if key != "out"]
        found = []
        for key in keys:
            values = [_shown(each[key]) if key in each else "-" for each in settings]
            if len({value for value in values if value != "-"} if key.startswith("stages.") else set(values)) > 1:
                found.append((key, values))
        return found

    @property
    def warnings(self) -> list[str]:
        """What makes scores of the runs not comparable."""
        found = []
        if len({facts.teacher_identity for facts in self.runs.values()}) > 1:
            found.append("the runs have different teachers: each KL is to the run's own one")
        judged = ("data.val", "data.val_tokens", "data.val_fraction")
        if any(key in judged for key, _ in self.differences):
            found.append("the runs were validated on different data: their scores say little about each other")
        return found

    @property
    def table(self) -> Rows:
        """The runs as rows of plain values, with the settings that differ as columns."""
        differing = self.differences
        head = ["run", "teacher", "stage", "kl", "ce", "agreement", "tokens", "seconds", "memory_bytes"]
        rows: Rows = [[*head, *(key for key, _ in differing)]]
        for i, (name, facts) in enumerate(self.runs.items()):
            final, memory = facts.final, _memory(facts)
            scores = [final.name, final.kl, final.ce, final.agreement] if final else [None] * 4
            own = [values[i] for _, values in differing]
            rows.append([name, Path(facts.teacher).name, *scores, facts.tokens, _training(facts), memory, *own])
        return rows

    @property
    def shown(self) -> list[list[str]]:
        """The table for people: the names of the columns, then a row for each run."""
        rows = [["run", "KL", "CE", "agreement", "tokens", "training", "memory"]]
        for name, facts in self.runs.items():
            final, memory, seconds = facts.final, _memory(facts), _training(facts)
            rows.append(
                [
                    name,
                    number(final.kl if final else None, ".4f"),
                    number(final.ce if final else None, ".4f"),
                    share(final.agreement if final else None),
                    rounded_count(facts.tokens),
                    clock(seconds) if seconds else "–",
                    rounded_bytes(memory) if memory else "–",
                ]
            )
        return rows


def compare_runs(paths: Sequence[Path]) -> Comparison:
    """Read run directories.

    Raises:
        UserError: fewer than two, the same one twice, or one that cannot be read.
    """
    if len(paths) < 2:
        raise UserError("one run alone cannot be compared", "name two or more; `rwkvinside report` shows one")
    resolved = [path.resolve() for path in paths]
    if repeated := [path for path in paths if resolved.count(path.resolve()) > 1]:
        raise UserError(f"run {repeated[0]} is named twice", "name different ones")
    short = [path.name for path in resolved]
    names = short if len(set(short)) == len(short) else [str(path) for path in paths]
    return Comparison({name: run_facts(path) for name, path in zip(names, paths, strict=True)})


def write_comparison(comparison: Comparison, out: Path) -> list[Path]:
    """Write compare.html, compare.csv, compare.tex and the figures; return the files.

    Raises:
        UserError: no run has measured anything, or no space.
    """
    pictures = _pictures(comparison)
    if not pictures:
        raise UserError("none of the runs has a training step or an evaluation yet", "train them first")
    files = write_pictures(pictures.values(), out / FIGURES)
    maps = []
    for name, facts in comparison.runs.items():
        cells = layer_cells(facts.layers)
        maps.append(
            {"name": name, "facts": facts, "text": describe(facts), "cells": cells, "kinds": layer_kinds(cells)}
        )
    page = render(
        "compare.html",
        title=" · ".join(comparison.runs),
        runs=maps,
        table=comparison.shown,
        best=_best(comparison),
        differences=comparison.differences,
        warnings=comparison.warnings,
        pictures=pictures,
    )
    write_text(out / PAGE, page)
    write_text(out / TABLE, csv_text(comparison.table))
    write_text(out / LATEX, latex(comparison.shown))
    return [out / PAGE, out / TABLE, out / LATEX, *files]


def latex(table: Sequence[Sequence[str]]) -> str:
    """Return a table for LaTeX's booktabs."""
    head, *rows = ([_escaped(cell) for cell in row] for row in table)
    lines = [f"  {' & '.join(row)} \\\\" for row in rows]
    columns = "l" + "r" * (len(head) - 1)
    beginning = [f"\\begin{{tabular}}{{{columns}}}", "  \\toprule", f"  {' & '.join(head)} \\\\", "  \\midrule"]
    return "\n".join([*beginning, *lines, "  \\bottomrule", "\\end{tabular}"]) + "\n"


def _escaped(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)


def _pictures(comparison: Comparison) -> dict[str, Picture]:
    rows, found = {name: facts.rows for name, facts in comparison.runs.items()}, []
    if figure := runs_validation_figure(rows):
        text = "Validation over all tokens of each run."
        found.append(Picture("compare-validation", figure, _joined(rows, validation_rows), text))
    if figure := runs_loss_figure(rows):
        text = "Training loss of the stages that runs have in common or alone, as the mean of the last steps."
        found.append(Picture("compare-training-loss", figure, _joined(rows, loss_rows), text))
    return {picture.name: picture for picture in found}


def _joined(runs: dict[str, list[dict]], table) -> Rows:
    """Return the rows of all runs, with the run as first column."""
    tables = {name: table(rows) for name, rows in runs.items()}
    head = next(iter(tables.values()))[0]
    return [["run", *head], *([name, *row] for name, rows in tables.items() for row in rows[1:])]


def _best(comparison: Comparison) -> str:
    """Return the name of the run that is nearest to its teacher, "" where none was compared."""
    finals = {name: facts.final.kl for name, facts in comparison.runs.items() if facts.final and facts.final.kl}
    return min(finals, key=lambda name: finals[name] or 0.0, default="")


def _training(facts: RunFacts) -> float | None:
    return sum(cost.seconds for cost in facts.costs if cost.seconds) or None


def _memory(facts: RunFacts) -> float | None:
    return max((cost.memory for cost in facts.costs if cost.memory), default=None)


def _settings(config: Mapping) -> dict[str, object]:
    """Return the settings of a run by path, without those of stages that it does not run."""
    stages = config.get("stages") or {}
    run = {f"stages.{name}": stage for name, stage in stages.items() if name in config.get("run", ())}
    return dict(flat_settings({key: value for key, value in config.items() if key != "stages"} | run))


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
