"""The leaderboard as one HTML page that needs nothing else: bars, criteria, decoded examples."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .leaderboard import SHOWN, criteria, short_name

STYLE = """
:root { color-scheme: light dark; --line: #8884; --bar: #4a78c8; --base: #999; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child, .text { text-align: left; }
.bar { display: inline-block; height: .7rem; background: var(--bar); vertical-align: middle; margin-right: .4rem; }
tr.baseline { color: #888; } tr.baseline .bar { background: var(--base); }
.pass { color: #2a8a3a; font-weight: 600; } .fail { color: #c03030; font-weight: 600; }
.scroll { overflow-x: auto; }
"""
BAR = 90  # pixels of a cosine of 1


def html_page(title: str, rows: Sequence[dict], baselines: Sequence[dict], samples: Sequence[dict]) -> str:
    """Return the page.

    Args:
        title: of the page.
        rows: of `leaderboard.read_rows`.
        baselines: of `leaderboard.read_baselines`.
        samples: decoded examples: {"context": [...], "target": "...", "decoded": {name: text}}.
    """
    parts = [f"<h1>{escape(title)}</h1>"]
    for source, lines in criteria(rows).items():
        own = [row for row in rows if row["source"] == source]
        around = [row for row in baselines if row["source"] == source]
        parts += [f"<h2>{escape(source)}</h2>", _runs(own, around), _criteria(lines)]
    if samples:
        parts += ["<h2>Decoded examples</h2>", *map(_sample, samples)]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _runs(rows: Sequence[dict], baselines: Sequence[dict]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in ("run", *(t for _, t in SHOWN), "parameters", "p95 ms"))
    body = []
    for row in sorted([*rows, *baselines], key=lambda row: (-row["cosine"], row["run"])):
        model = row.get("params") is not None
        cells = [f"<td>{escape(short_name(row['run']))}</td>", *(_cell(name, row.get(name)) for name, _ in SHOWN)]
        cells += [f"<td>{row['params']:,}</td><td>{row['p95_ms']:.1f}</td>" if model else "<td></td><td></td>"]
        body.append(f'<tr class="{"model" if model else "baseline"}">{"".join(cells)}</tr>')
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(body)}</table></div>'


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "<td></td>"
    bar = f'<span class="bar" style="width:{max(0, round(BAR * value))}px"></span>' if name == "cosine" else ""
    return f"<td>{bar}{value:.3f}</td>"


def _criteria(lines: Sequence[tuple[str, str, str]]) -> str:
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="{verdict.lower()}">{escape(verdict)}</td><td>{escape(best)}</td></tr>'
        for name, verdict, best in lines
    )
    return f"<table><tr><th>criterion of the study</th><th></th><th>best</th></tr>{rows}</table>"


def _sample(sample: dict) -> str:
    lines = [(f"context {i}", text) for i, text in enumerate(sample["context"], 1)]
    lines += [("next, true", sample["target"]), *((f"next, {name}", text) for name, text in sample["decoded"].items())]
    rows = "".join(f'<tr><td>{escape(name)}</td><td class="text">{escape(text)}</td></tr>' for name, text in lines)
    return f"<table>{rows}</table>"
