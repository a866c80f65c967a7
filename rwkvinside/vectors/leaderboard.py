"""The leaderboard of a directory of runs, a function of their results alone: the same results give the same bytes."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from ..support.files import write_text
from .grid import BASELINES
from .run import read_result

COLUMNS = (
    *("run", "arch", "params", "seed", "cosine", "cosine_low", "cosine_high", "gain", "gain_low", "gain_high", "mse"),
    *("r1", "r10", "mrr", "ca", "decode", "margin", "p50_ms", "p95_ms", "train_minutes", "minutes_per_epoch"),
    *("device", "source", "digest"),
)
# of the study: name, what is compared, at least (or at most)
CRITERIA = (
    ("cosine > 0.70", "cosine", 0.70, True),
    ("cosine > 0.85", "cosine", 0.85, True),
    ("decode accuracy > 50 %", "decode", 0.50, True),
    ("decode accuracy > 75 %", "decode", 0.75, True),
    ("latency (p95) < 100 ms", "p95_ms", 100.0, False),
    ("training < 1 hour", "train_minutes", 60.0, False),
)
SHOWN = (
    ("cosine", "cosine"),
    ("gain", "over the context mean"),
    ("mse", "MSE"),
    ("r1", "R@1"),
    ("r10", "R@10"),
    ("mrr", "MRR"),
    ("ca", "CA"),
    ("decode", "decoded"),
)


def read_rows(out: Path) -> list[dict]:
    """Return a row for every finished run below a directory, best first within its data.

    Raises:
        UserError: there is none.
    """
    rows = []
    for folder in sorted(path for path in out.iterdir() if path.is_dir()) if out.is_dir() else []:
        if (result := read_result(folder)) is not None:
            data = {"source": Path(result["data"]["source"]).name, "digest": result["data"]["digest"][:12]}
            row = {"run": folder.name} | {k: v for k, v in result.items() if k != "data"} | data | result["metrics"]
            rows.append({name: row.get(name) for name in COLUMNS})
    if not rows:
        raise UserError(f"{out} has no finished run", "rwkvinside vectors grid PLAN --out DIR")
    return sorted(rows, key=lambda row: (row["source"], row["digest"], -row["cosine"], row["run"]))


def read_baselines(out: Path) -> list[dict]:
    """Return a row for every baseline that was computed there."""
    if not (out / BASELINES).is_file():
        return []
    known = json.loads((out / BASELINES).read_text(encoding="utf-8"))
    return [
        {"run": name, "source": Path(each["source"]).name, "digest": each["digest"][:12]} | numbers
        for each in known.values()
        for name, numbers in each["rows"].items()
    ]


def write_leaderboard(out: Path) -> list[Path]:
    """Write leaderboard.md, .csv and .json next to the runs; return their paths."""
    rows = read_rows(out)
    paths = [out / f"leaderboard.{kind}" for kind in ("md", "csv", "json")]
    texts = (markdown(rows, read_baselines(out)), _csv(rows), json.dumps(rows, indent=1) + "\n")
    for path, text in zip(paths, texts, strict=True):
        write_text(path, text)
    return paths


def short_name(run: str) -> str:
    """Return the name of a run in its plan, without the hash of its settings."""
    return re.sub(r"-[0-9a-f]{8}$", "", run)


def criteria(rows: Sequence[dict]) -> dict[str, list[tuple[str, str, str]]]:
    """Return for each data set: criterion, PASS, FAIL or "no texts", and by which run.

    A criterion passes when a run meets it; of the last two, when the run with the best cosine does.
    """
    found = {}
    for source in dict.fromkeys(row["source"] for row in rows):
        own = [row for row in rows if row["source"] == source]
        best = max(own, key=lambda row: row["cosine"])
        lines = []
        for name, column, limit, at_least in CRITERIA:
            values = [(row[column], row["run"]) for row in (own if at_least else [best]) if row[column] is not None]
            if not values:
                lines.append((name, "no texts", ""))
                continue
            value, run = max(values) if at_least else min(values)
            met = value > limit if at_least else value < limit
            lines.append((name, "PASS" if met else "FAIL", f"{value:.3g} ({short_name(run)})"))
        found[source] = lines
    return found


def markdown(rows: Sequence[dict], baselines: Sequence[dict]) -> str:
    """Return the leaderboard with criteria as Markdown, a table for each data set."""
    parts = []
    for source, lines in criteria(rows).items():
        own = [row for row in rows if row["source"] == source]
        digests = ", ".join(dict.fromkeys(row["digest"] for row in own))
        parts += [f"### {source}", f"Data {digests}.", _table(own, [b for b in baselines if b["source"] == source])]
        parts.append("| criterion of the study | | best |\n|---|---|---|\n" + "\n".join(map(_line, lines)))
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[dict], baselines: Sequence[dict]) -> str:
    head = ["run", "architecture", "parameters", *(title for _, title in SHOWN), "p50 / p95 ms", "train min"]
    lines = [head, ["---"] * len(head)]
    entries = [*rows, *({"arch": "(baseline)"} | row for row in baselines)]
    for row in sorted(entries, key=lambda row: (-row["cosine"], row["run"])):
        params = f"{row['params'] / 1e6:.2f} M" if row.get("params") else ""
        times = [f"{row['p50_ms']:.1f} / {row['p95_ms']:.1f}", f"{row['train_minutes']:.1f}"] if params else ["", ""]
        lines.append([short_name(row["run"]), row["arch"], params, *(_number(row, name) for name, _ in SHOWN), *times])
    return "\n".join(_line(line) for line in lines)


def _number(row: dict, name: str) -> str:
    value = row.get(name)
    if value is None:
        return ""
    if name in ("cosine", "gain") and row.get(f"{name}_low") is not None:
        sign = "+" if name == "gain" else ""
        return f"{value:{sign}.3f} ({row[f'{name}_low']:{sign}.3f} to {row[f'{name}_high']:{sign}.3f})"
    return f"{value:.3f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _csv(rows: Sequence[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
