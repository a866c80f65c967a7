"""The lines of results.jsonl, and the table that is made of them alone."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

RESULTS, LOG, SUMMARY = "results.jsonl", "session.log", "summary.txt"
WIDTH = 200


def append(directory: Path, line: Mapping) -> None:
    """Append a line to the results; it is on the disk when this returns."""
    with open(directory / RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(_plain(line), allow_nan=False, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(file: Path) -> list[dict]:
    """Return all lines of results that are complete; the last one may be cut where a process was killed."""
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def summary(lines: list[dict]) -> str:
    """Return a table of the stages, and below it a line for each measurement."""
    ends = [line for line in lines if "ended" in line]
    table = [f"{'stage':<12} {'ended':<8} {'seconds':>8} {'measured':>9} {'errors':>7}"]
    for end in ends:
        own = _measured(lines, end["stage"])
        errors = sum("error" in line for line in own)
        why = f"  {end['why']}" if "why" in end else ""
        table.append(
            f"{end['stage']:<12} {end['ended']:<8} {end['seconds']:>8.1f} {len(own) - errors:>9} {errors:>7}{why}"
        )
    for end in ends:
        own = _measured(lines, end["stage"])
        table += ["", end["stage"]] if own else []
        table += [_short(line) for line in own]
    return "\n".join(table) + "\n"


def _measured(lines: list[dict], stage: str) -> list[dict]:
    return [line for line in lines if line["stage"] == stage and "ended" not in line]


def _short(line: Mapping) -> str:
    numbers = [
        f"{name} {_shown(value)}"
        for name, value in line.items()
        if name not in ("stage", "seconds", "what", "attempt", "took") and isinstance(value, int | float | str)
    ]
    return f"  {line['what']}: {', '.join(numbers)}"[:WIDTH]


def _shown(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: object) -> object:
    """Return a value that JSON has; numbers that are not finite become words."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value
