"""The page of a run: one HTML file that needs nothing but itself."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..runs.metrics_file import of_kind
from ..support.progress import clock
from ..support.text import rounded_bytes, rounded_count, rounded_flop, spans
from .evaluation import evaluation_figure
from .facts import RunFacts
from .figures import alignment_figure, loss_figure, position_figure, validation_figure
from .svg import inline_svg
from .tables import Rows, alignment_rows, loss_rows, position_rows, recall_rows, validation_rows

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """A figure of a page, with the numbers behind it.

    Attributes:
        name: of its files.
        figure: for SVG and PDF.
        rows: for CSV.
        caption: what it shows and how to read it.
    """

    name: str
    figure: Figure
    rows: Rows
    caption: str

    @property
    def svg(self) -> str:
        """The figure as an element of the page."""
        return inline_svg(self.figure, self.caption)


def pictures_of(facts: RunFacts) -> dict[str, Picture]:
    """Return the figures that a run has numbers for, by name."""
    rows, found = facts.rows, []
    if figure := validation_figure(rows):
        text = "Validation over all tokens of the run; dotted lines mark where stages begin, numbers the last values."
        first = of_kind(rows, "eval")[0]
        if not first["step"] and first.get("kl") is not None:
            text += f" Before all training the KL was {first['kl']:.3g}."
        found.append(Picture("validation", figure, validation_rows(rows), text))
    if figure := loss_figure(rows):
        text = "Training loss of each stage; the number is the last value of the line."
        found.append(Picture("training-loss", figure, loss_rows(rows), text))
    if figure := alignment_figure(rows):
        text = "How far each layer's mixer is from the attention that it replaces, over the steps; darker is closer."
        found.append(Picture("alignment", figure, alignment_rows(rows), text))
    if "by_position" in facts.evaluation:
        text = "Perplexity of both models, and their divergence, by how much of the document they have read."
        figure = position_figure(facts.evaluation)
        found.append(Picture("position", figure, position_rows(facts.evaluation), text))
    if facts.evaluation.get("recall"):
        text = "Share of right answers by the length of the text and where in it the answer stands; darker is less."
        figure = evaluation_figure({"recall": facts.evaluation["recall"]})
        found.append(Picture("recall", figure, recall_rows(facts.evaluation), text))
    return {picture.name: picture for picture in found}


def report_page(facts: RunFacts, pictures: Mapping[str, Picture]) -> str:
    """Return the page of a run as HTML."""
    return render(
        "report.html",
        title=facts.name,
        facts=facts,
        summary=describe(facts),
        highlights=_highlights(facts),
        layers=(cells := layer_cells(facts.layers)),
        kinds=layer_kinds(cells),
        controlled=any(row.name == "control" for row in facts.scores),
        on_cpu=facts.forecast.get("device") == "cpu",
        commands="\n".join(facts.repeat_commands),
        costs=_costs(facts),
        pictures=pictures,
        warnings=facts.forecast.get("warnings", ()),
    )


def render(template: str, **values: object) -> str:
    """Return a template of this package, filled in."""
    stamp = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    return _environment().get_template(template).render(version=__version__, stamp=stamp, host=_machine(), **values)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("rwkvinside.report")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"count": rounded_count, "bytes": rounded_bytes, "flop": rounded_flop, "clock": clock}
    environment.filters |= {"number": number, "share": share}
    return environment


def number(value: float | None, form: str = ".3f") -> str:
    """Return a number in a format, a dash where there is none."""
    return "–" if value is None else format(value, form)


def share(value: float | None) -> str:
    """Return a share in percent."""
    return "–" if value is None else f"{100 * value:.1f} %"


def describe(facts: RunFacts) -> str:
    """Return in a sentence what was converted."""
    layers, teacher = facts.layers, Path(facts.teacher).name if facts.teacher else "A teacher"
    if not layers:
        return teacher
    recurrent = [layer for layer in layers if layer["kind"] == "rwkv"]
    fresh = facts.config.get("teacher", {}).get("fresh")
    windows = sorted({(x["window"], x["sinks"]) for x in recurrent if "window" in x})
    text = f"{teacher}, {len(recurrent)} of {len(layers)} layers of attention turned into RWKV-7"
    if fresh:
        text = f"A model from nothing, {len(recurrent)} of {len(layers)} layers are RWKV-7"
    if windows:
        shown = " or ".join(f"{w} tokens" + f" and {s} sinks" * bool(s) for w, s in windows)
        text += f", with a window of {shown}"
    return text


def layer_cells(layers: list[dict]) -> list[dict]:
    """Return the layers with what their cells say: {"index", "kind", "title"}."""
    cells = []
    for index, layer in enumerate(layers):
        kind = "window" if "window" in layer else layer["kind"]
        title = {"attention": "attention, as in the teacher", "rwkv": "RWKV-7"}.get(kind, "")
        if kind == "window":
            title = f"RWKV-7 with a window of {layer['window']}" + f" and {layer['sinks']} sinks" * bool(layer["sinks"])
        cells.append({"index": index, "kind": kind, "title": title})
    return cells


def layer_kinds(cells: list[dict]) -> list[tuple[str, str, str]]:
    """Return the kinds of layers that there are: kind, what it is, which layers."""
    found: dict[tuple[str, str], list[int]] = {}
    for cell in cells:
        found.setdefault((cell["kind"], cell["title"]), []).append(cell["index"])
    return [(kind, title, spans(indices)) for (kind, title), indices in found.items()]


def _highlights(facts: RunFacts) -> list[tuple[str, str, str]]:
    """Return the numbers at the top: value, unit, what it is."""
    found, final = [], facts.final
    if final is not None and final.kl is not None:
        found.append((f"{final.kl:.3f}", "nats", "KL to the teacher, per token"))
    if final is not None and final.agreement is not None:
        found.append((f"{100 * final.agreement:.1f}", "%", "same next token as the teacher"))
    if final is not None and final.ce is not None:
        teacher = next((row.ce for row in facts.scores if row.name == "teacher"), None)
        above = "cross-entropy" if teacher is None else f"cross-entropy; the teacher has {teacher:.3f}"
        found.append((f"{final.ce:.3f}", "nats", above))
    took = "" if facts.seconds is None else f", in {clock(facts.seconds)} in all"
    found.append((*_split(rounded_count(facts.tokens)), f"tokens read{took}"))
    return found


def _split(text: str) -> tuple[str, str]:
    value, _, unit = text.partition(" ")
    return value, unit


def _costs(facts: RunFacts) -> list[dict]:
    """Return what each stage took next to the plan, as text."""
    rows = []
    for cost in facts.costs:
        near = None
        if cost.memory is not None and cost.planned and facts.forecast["device"] != "cpu":
            near = f"{100 * cost.memory / cost.planned:.0f} %"
        rows.append(
            {
                "name": cost.name,
                "tokens": rounded_count(cost.tokens),
                "time": "–" if cost.seconds is None else clock(cost.seconds),
                "speed": "–" if cost.tokens_per_s is None else f"{cost.tokens_per_s:,.0f}",
                "mfu": "–" if cost.mfu is None else f"{100 * cost.mfu:.0f} %",
                "memory": "–" if cost.memory is None else rounded_bytes(cost.memory),
                "planned": "–" if cost.planned is None else rounded_bytes(cost.planned),
                "near": near or "–",
            }
        )
    return rows


def _machine() -> str:
    return f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
