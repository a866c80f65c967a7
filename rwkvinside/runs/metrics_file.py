"""metrics.jsonl as rows, and the columns that plots need.

The one place that knows what a damaged file looks like.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import UserError


def read_metrics(path: Path) -> list[dict]:
    """Return all rows of a metrics.jsonl, in order.

    A last line without its line end is a row that a killed run was still writing; it is left out.

    Raises:
        UserError: there is no such file, or a line is not a JSON object.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist", "give the directory of a run that has started")
    text = path.read_text(encoding="utf-8")
    lines = text.split("\n")[:-1]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: {error}", "remove the damaged line") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number} is not a JSON object", "remove the damaged line")
        rows.append(row)
    return rows


def of_kind(rows: Sequence[dict], kind: str, stage: str | None = None) -> list[dict]:
    """Return the rows of one kind, and of one stage if given."""
    return [row for row in rows if row.get("kind") == kind and stage in (None, row.get("stage"))]


def stages(rows: Sequence[dict], kind: str) -> list[str]:
    """Return the names of the stages with rows of a kind, in the order of the run."""
    return list(dict.fromkeys(row["stage"] for row in of_kind(rows, kind)))


def column(rows: Sequence[dict], name: str) -> np.ndarray:
    """Return (rows,) float64; NaN where a row does not have the value."""
    return np.array([row.get(name, np.nan) for row in rows], dtype=np.float64)


def tokens_before(rows: Sequence[dict]) -> dict[str, int]:
    """Return the tokens read before each stage began.

    On an axis of tokens a run's stages follow each other.
    """
    before, total = {}, 0
    for stage in dict.fromkeys(row["stage"] for row in rows if "stage" in row):
        before[stage] = total
        total += max((row["tokens"] for row in rows if row.get("stage") == stage and "tokens" in row), default=0)
    return before


def alignment(rows: Sequence[dict], stage: str, columns: int = 400) -> tuple[np.ndarray, list[int], np.ndarray]:
    """Return the error per layer over the steps of one stage.

    Returns:
        (steps,) last step of each column, the layer indices, and (layers, steps) the geometric mean of the relative
        squared error over the steps of a column.
    """
    train = [row for row in of_kind(rows, "train", stage) if row.get("layers")]
    layers = sorted({int(layer) for row in train for layer in row["layers"]})
    bins = np.array_split(np.arange(len(train)), min(columns, len(train))) if train else []
    errors = np.array([[row["layers"].get(str(layer), np.nan) for row in train] for layer in layers], dtype=np.float64)
    with np.errstate(divide="ignore"):
        means = np.array([[np.exp(np.mean(np.log(errors[i, bin]))) for bin in bins] for i in range(len(layers))])
    return np.array([train[bin[-1]]["step"] for bin in bins]), layers, means
