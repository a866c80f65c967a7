"""The end of a run on a terminal: scores, time, a sample, what to do next; within 80 columns."""

from __future__ import annotations

import textwrap
from typing import NamedTuple

from ..support.progress import clock
from ..support.text import rounded_bytes, rounded_count
from .facts import RunFacts

WIDTH = 79


class _Score(NamedTuple):
    """A column of scores."""

    title: str
    field: str
    form: str
    width: int


SCORES = (_Score("KL", "kl", ".4f", 9), _Score("CE", "ce", ".4f", 9), _Score("agreement", "agreement", ".1%", 12))


def end_screen(facts: RunFacts) -> str:
    """Return what a user sees when a run is done."""
    # a model from nothing has no teacher to be compared with
    shown = [column for column in SCORES if any(getattr(row, column.field) is not None for row in facts.scores)]
    titles = "".join(f"{column.title:>{column.width}}" for column in shown)
    lines = ["", f"{'':<16}{titles}{'tokens':>10}{'time':>10}{'memory':>12}"]
    costs = {cost.name: cost for cost in facts.costs}
    for row in facts.scores:
        cost = costs.get(row.name)
        took = (
            f"{rounded_count(cost.tokens):>10}"
            f"{'' if cost.seconds is None else clock(cost.seconds):>10}"
            f"{'' if cost.memory is None else rounded_bytes(cost.memory):>12}"
            if cost
            else ""
        )
        name = row.name if cost is None else f"after {row.name}"
        scores = "".join(f"{_number(getattr(row, c.field), c.form):>{c.width}}" for c in shown)
        lines.append(f"{name:<16}{scores}{took}".rstrip())
    for text in facts.early_ends:
        lines += ["", *textwrap.wrap(text, WIDTH)]
    for sample in facts.samples[:1]:
        lines.append("")
        lines += _wrapped("prompt", sample["prompt"])
        for name in ("teacher", "student"):
            if name in sample:
                lines += _wrapped(name, sample[name])
    if facts.seconds is not None:
        lines += ["", f"{clock(facts.seconds)} in all, {rounded_count(facts.tokens)} tokens, in {facts.path}"]
    lines += ["", "next"]
    lines += [f"  {command}" for command, _ in facts.next_commands]
    return "\n".join(lines) + "\n"


def _wrapped(name: str, text: str, most: int = 3) -> list[str]:
    """Return a text of few lines, with its name in front."""
    return textwrap.wrap(
        " ".join(text.split()) or "(nothing)",
        WIDTH,
        initial_indent=f"{name:<9}",
        subsequent_indent=" " * 9,
        max_lines=most,
        placeholder=" ...",
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
