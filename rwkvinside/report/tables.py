"""The numbers behind each figure of a run, as rows for a CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from ..runs.metrics_file import alignment, of_kind, stages, tokens_before

Rows = list[list[object]]
"""The names of the columns, then the rows."""


def csv_text(rows: Sequence[Sequence[object]]) -> str:
    """Return rows as CSV; what is missing is empty."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([["" if x is None else x for x in row] for row in rows])
    return text.getvalue()


def loss_rows(rows: Sequence[dict]) -> Rows:
    """Return the logged steps of all stages."""
    names = ["stage", "step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "mfu", "memory_mb"]
    return [names, *([row.get(name) for name in names] for row in of_kind(rows, "train"))]


def validation_rows(rows: Sequence[dict]) -> Rows:
    """Return all evaluations, and those of a control, over the tokens of the run."""
    before, scores = tokens_before(rows), ["kl", "ce", "ce_teacher", "agreement"]
    measured = [row for row in rows if row.get("kind") in ("eval", "control")]
    return [
        ["of", "stage", "step", "tokens", *scores],
        *(
            [
                "control" if row["kind"] == "control" else "student",
                row["stage"],
                row["step"],
                before[row["stage"]] + row.get("tokens", 0),
                *(row.get(name) for name in scores),
            ]
            for row in measured
        ),
    ]


def alignment_rows(rows: Sequence[dict]) -> Rows:
    """Return the error of each layer over the steps, as the heat map has it."""
    found: Rows = [["stage", "step", "layer", "relative_squared_error"]]
    for stage in stages(rows, "train"):
        steps, layers, errors = alignment(rows, stage)
        for i, layer in enumerate(layers):
            found += ([stage, int(step), layer, float(error)] for step, error in zip(steps, errors[i], strict=True))
    return found


def position_rows(evaluation: dict) -> Rows:
    """Return the scores by position of an evaluation."""
    names = list(evaluation["by_position"][0])
    return [names, *([bucket.get(name) for name in names] for bucket in evaluation["by_position"])]


def recall_rows(evaluation: dict) -> Rows:
    """Return the shares of right answers of an evaluation by model, task, length and depth."""
    scores = evaluation["recall"]["scores"]
    names = list(next(iter(scores.values()))[0])
    return [["model", *names], *([model, *(s.get(name) for name in names)] for model in scores for s in scores[model])]
