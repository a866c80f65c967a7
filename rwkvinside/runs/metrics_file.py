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
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else error
            raise UserError(f"{path}, line {number}: {reason}", "remove the damaged line") from error
        rows.append(row)
    for number, row in enumerate(rows, start=1):
        if wrong := _wrong(row):
            raise UserError(f"{path}, line {number} {wrong}", "remove the damaged line")
    return rows


def _wrong(row: object) -> str:
    """Return what makes a row none of a run's, "" if nothing."""
    if not isinstance(row, dict):
        return "is not a JSON object"
    if row.get("kind") in ("train", "eval", "sample"):
        if not isinstance(row.get("stage"), str):
            return f"is of stage {row.get('stage')!r:.40}, not a name"
        for name in ("step", "tokens"):
            if not isinstance(row.get(name, 0 if name == "tokens" else None), int):
                return f"has {name} = {row.get(name)!r:.40}, not a whole number"
    layers = row.get("layers", {})
    if not isinstance(layers, dict) or not all(layer.isdecimal() for layer in layers):
        return f"has layers = {layers!r:.40}, not numbers by layer"
    samples = row.get("samples", [])
    if not isinstance(samples, list) or not all(isinstance(each, dict) for each in samples):
        return f"has samples = {samples!r:.40}, not a list of texts"
    for each in samples:
        if not {"prompt", "student"} <= each.keys() or not all(isinstance(text, str) for text in each.values()):
            return f"has a sample {each!r:.40}, not texts by name"
    for name, value in row.items():
        if name not in ("kind", "stage", "teacher", "samples") and not _is_numbers(value):
            return f"has {name} = {value!r:.40}, not a number"
    return ""


def _is_numbers(value: object) -> bool:
    if isinstance(value, (dict, list)):
        return all(map(_is_numbers, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, (int, float)) and abs(value) < 1e300


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
