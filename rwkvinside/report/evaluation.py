"""The picture of an evaluation: scores by position, maps of recall by length and depth."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import UserError
from .figures import draw_positions, new_figure, position_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def evaluation_figure(result: dict) -> Figure:
    """Return the picture of the JSON of `rwkvinside eval`.

    Raises:
        UserError: there is nothing that it shows.
    """
    recall = result.get("recall")
    tasks, models = ([], []) if recall is None else (list(recall["chance"]), list(recall["scores"]))
    rows = len(models) + ("by_position" in result)
    if not rows:
        raise UserError("there is nothing to draw", "--png shows --data and --recall")
    figure = new_figure(10, 3.2 * ("by_position" in result) + 1.9 * len(models))
    heights = [3.2] * ("by_position" in result) + [1.9] * len(models)
    parts = np.atleast_1d(figure.subfigures(rows, 1, height_ratios=heights))
    if "by_position" in result:
        draw_positions(position_axes(parts[0], result), result)
    for part, model in zip(parts[rows - len(models) :], models, strict=True):
        for ax, task in zip(np.atleast_1d(part.subplots(1, len(tasks))), tasks, strict=True):
            draw_recall(ax, [s for s in recall["scores"][model] if s["task"] == task], f"{task}: {model}")
    return figure


def draw_recall(ax: Axes, scores: list[dict], title: str) -> None:
    """Draw the share of right answers by length and depth as a map with numbers.

    Args:
        ax: where to draw.
        scores: of one model and task, from `RecallReport.to_dict`.
        title: of the map.
    """
    lengths, depths = sorted({s["length"] for s in scores}), sorted({s["depth"] for s in scores})
    shares = np.full((len(depths), len(lengths)), np.nan)
    for s in scores:
        value = s["exact"] if s["chosen"] is None else s["chosen"]
        shares[depths.index(s["depth"]), lengths.index(s["length"])] = value
    ax.imshow(shares, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        color = "white" if share < 0.6 else "#111111"  # on the map itself, whatever the page
        ax.text(column, row, f"{share:.0%}", ha="center", va="center", fontsize=8, color=color)
    ax.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    ax.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    ax.set_title(title, fontsize=10, loc="left")
    ax.set_xlabel("tokens of the text")
    ax.set_ylabel("depth of the answer")
