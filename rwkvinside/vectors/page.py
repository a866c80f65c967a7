"""The leaderboard as one HTML page in the style of the other reports: runs, criteria, decoded examples."""

from __future__ import annotations

from collections.abc import Sequence

from ..report.page import number, render
from .leaderboard import SHOWN, criteria, short_name


def html_page(title: str, rows: Sequence[dict], baselines: Sequence[dict], samples: Sequence[dict]) -> str:
    """Return the page.

    Args:
        title: of the page.
        rows: of `leaderboard.read_rows`.
        baselines: of `leaderboard.read_baselines`.
        samples: decoded examples: {"context": [...], "target": "...", "decoded": {name: text}}.
    """
    parts = []
    for source, lines in criteria(rows).items():
        around = [row for row in (*rows, *baselines) if row["source"] == source]
        ranked = sorted(around, key=lambda row: (-row["cosine"], row["run"]))
        parts.append({"source": source, "rows": [_row(row) for row in ranked], "criteria": lines})
    columns = ["run", *(name for _, name in SHOWN), "parameters", "p95 ms"]
    return render(
        "leaderboard.html", title=title, parts=parts, columns=columns, samples=[_lines(sample) for sample in samples]
    )


def _row(row: dict) -> dict:
    is_model = row.get("params") is not None
    cells = [number(row.get(name)) for name, _ in SHOWN]
    cells += [f"{row['params']:,}", f"{row['p95_ms']:.1f}"] if is_model else ["", ""]
    return {"kind": "model" if is_model else "reference", "name": short_name(row["run"]), "cells": cells}


def _lines(sample: dict) -> list[tuple[str, str]]:
    context = [(f"context {i}", text) for i, text in enumerate(sample["context"], 1)]
    decoded = [(f"next, {name}", text) for name, text in sample["decoded"].items()]
    return [*context, ("next, true", sample["target"]), *decoded]
