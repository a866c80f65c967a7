"""One drawing function per question, each onto a matplotlib Axes, and the figures made of them.

Colors are Okabe and Ito's, which people with any color vision can tell apart; color maps are perceptually uniform.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UserError
from ..runs.metrics_file import alignment, column, of_kind, stages, tokens_before
from ..support.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"
WIDTH = 9.8  # inches of a figure on a page
PANELS = 3  # beside each other
AMBER, PINK, BLACK = "#E69F00", "#CC79A7", "#222222"
DATELESS = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}  # the same figure is the same file
RUN_COLORS = (BLUE, ORANGE, GREEN, PINK, AMBER, GREY)
LAYER_UNITS = {
    "error": "relative error of its mixer",
    "restore": "KL that its attention saves",
    "restore+distill": "KL that its attention saves",
    "swap": "recall lost per likelihood lost",
    "greedy": "KL that its attention saves",
}
LOSS_UNITS = {
    "align": "alignment loss (relative squared error)",
    "distill": "KL to the teacher (nats per token)",
    "long": "loss (nats per token)",
    "pretrain": "cross entropy (nats per token)",
    "sft": "cross entropy (nats per token)",
}


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of a size in inches, drawn without a display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=120)


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure, the same bytes each time, in the format that the name ends with: png, svg or pdf.

    Raises:
        UserError: no space, or a directory that cannot be written.
    """
    import matplotlib

    form = path.suffix[1:]
    try:
        with replacing(path) as temporary, matplotlib.rc_context({"svg.hashsalt": path.stem}):
            figure.savefig(temporary, format=form, metadata=DATELESS.get(form))
    except OSError as error:
        cause = f"cannot write {path}: {error.strerror or error}"
        raise UserError(cause, "free space, or make the directory writable") from error


def _finish(ax: "Axes", title: str, x: str, y: str) -> None:
    ax.set_title(title, fontsize=10, loc="left")
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _count_axis(axis) -> None:
    from matplotlib.ticker import EngFormatter

    axis.set_major_formatter(EngFormatter(sep=""))


def _plain_log(ax: "Axes", values: np.ndarray) -> None:
    """Make the y axis logarithmic, with few ticks that are plain numbers.

    By default matplotlib labels no tick when all values are within one decade.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    ax.set_yscale("log")
    positive = values[np.isfinite(values) & (values > 0)]
    ratio = positive.max() / positive.min() if len(positive) else 1.0
    few = MaxNLocator(5) if ratio < 6 else LogLocator(subs=(1, 2, 5) if ratio < 30 else (1,))
    ax.yaxis.set_major_locator(few)
    if ratio < 6:
        ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _end_value(ax: "Axes", x: float, y: float, color: str, form: str = ".3g") -> None:
    """Write the last value of a line beside its end."""
    if np.isfinite(y):
        text = format(y, form)
        ax.annotate(
            text, (x, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8, color=color, clip_on=False
        )


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean of the last `window` values at each point (fewer at the start)."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    index = np.arange(1, len(values) + 1)
    first = np.maximum(index - window, 0)
    return (sums[index] - sums[first]) / (index - first)


def draw_loss(ax: "Axes", rows: Sequence[dict], stage: str) -> None:
    """Draw the training loss of a stage over its tokens.

    Where there are many steps, each is gray and the mean of the last ones blue.
    """
    train = of_kind(rows, "train", stage)
    tokens, loss = column(train, "tokens"), column(train, "loss")
    window = max(1, len(train) // 25)
    if window == 1:
        ax.plot(tokens, loss, color=BLUE, linewidth=1.5)
    else:
        ax.plot(tokens, loss, color=GREY, linewidth=0.7, alpha=0.8, label="each logged step")
        ax.plot(tokens, smooth(loss, window), color=BLUE, linewidth=1.8, label="mean over 4 % of the steps")
    if len(train):
        _end_value(ax, tokens[-1], smooth(loss, window)[-1], BLUE)
    _plain_log(ax, loss)
    _count_axis(ax.xaxis)
    _finish(ax, f"{stage}: training loss", "tokens", LOSS_UNITS.get(stage, "loss"))


def draw_alignment(ax: "Axes", rows: Sequence[dict], stage: str) -> None:
    """Draw the relative squared error of every layer over the steps as a heat map."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    steps, layers, errors = alignment(rows, stage)
    edges = np.concatenate([[0], steps])
    positive = errors[np.isfinite(errors) & (errors > 0)]
    if not len(positive):
        positive = np.ones(1)  # a run that diverged at once: an empty map with its axes
    norm = LogNorm(positive.min(), max(positive.max(), positive.min() * 1.01))
    image = ax.pcolormesh(edges, np.arange(len(layers) + 1) - 0.5, errors, norm=norm, cmap="cividis", rasterized=True)
    ax.set_yticks(range(len(layers)), layers)
    if len(layers) > 16:
        ax.yaxis.set_major_locator(MaxNLocator(12, integer=True))
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    bar = ax.figure.colorbar(image, ax=ax, label="relative squared error")
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    _finish(ax, f"{stage}: error of each layer's mixer", "step", "layer")
    ax.grid(False)


def draw_validation(ax: "Axes", rows: Sequence[dict], name: str, unit: str, *, log: bool = False) -> None:
    """Draw a validation score over all tokens of the run, marking where stages begin.

    Args:
        ax: where to draw.
        rows: of metrics.jsonl.
        name: of the score, a key of `VALIDATION_TITLES`.
        unit: of the score.
        log: use a logarithmic y axis.
    """
    before = tokens_before(rows)
    measured = _trained(of_kind(rows, "eval"))
    tokens = column(measured, "tokens") + np.array([before[row["stage"]] for row in measured])
    values = column(measured, name)
    teacher = column(measured, "ce_teacher")
    compared = bool(np.isfinite(teacher).any())  # a model from nothing has no teacher
    controls = of_kind(rows, "control")
    label = "student" if compared or controls else None
    ax.plot(tokens, values, color=BLUE, marker="o", markersize=4, linewidth=1.5, label=label)
    if len(measured):
        _end_value(ax, tokens[-1], values[-1], BLUE, ".3f")
    if name == "ce" and compared:
        ax.plot(tokens, teacher, color=ORANGE, linestyle="--", linewidth=1.5, label="teacher")
    if controls:
        label = "control: teacher cut to windows"
        ax.axhline(controls[-1][name], color=GREY, linestyle="-.", linewidth=1.5, label=label)
        values = np.append(values, controls[-1][name])  # within the axis, too
    if log:
        _plain_log(ax, values)
    ax.margins(y=0.12)  # names of stages are at the top
    top = ax.get_xaxis_transform()
    for stage in stages(rows, "train"):
        ax.axvline(before[stage], color=GREY, linewidth=0.8, linestyle=":")
        ax.text(before[stage], 0.98, f" {stage}", transform=top, va="top", fontsize=8, color="#555555")
    _count_axis(ax.xaxis)
    _finish(ax, f"validation: {VALIDATION_TITLES[name]}", "tokens of the run", unit)


VALIDATION_TITLES = {"kl": "KL divergence", "ce": "cross entropy", "agreement": "agreement"}
VALIDATION = (
    ("kl", "nats per token", True),
    ("ce", "nats per token", False),
    ("agreement", "share of tokens", False),
)


def _measured(rows: Sequence[dict]) -> list[tuple[str, str, bool]]:
    """Return those of `VALIDATION` that some evaluation has."""
    return [score for score in VALIDATION if any(score[0] in row for row in of_kind(rows, "eval"))]


def _shared_legend(figure: "Figure | SubFigure", columns: int = 4) -> None:
    """Say above all panels what has a label in some of them: there it lies on no data."""
    found = {label: x for ax in figure.axes for x, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if found:
        place = "outside upper left"
        figure.legend(found.values(), found, loc=place, ncols=columns, frameon=False, fontsize=9)


def loss_figure(rows: Sequence[dict]) -> "Figure | None":
    """Draw the training loss, one panel per stage; None if nothing was trained."""
    names = stages(rows, "train")
    if not names:
        return None
    figure, panels = _panels(len(names), 3.2)
    for ax, stage in zip(panels, names, strict=True):
        draw_loss(ax, rows, stage)
    _shared_legend(figure)
    return figure


def _panels(count: int, height: float) -> "tuple[Figure, list[Axes]]":
    """Return a figure of so many panels, at most `PANELS` beside each other, in lines of a height in inches."""
    lines = -(-count // PANELS)
    figure = new_figure(WIDTH, height * lines)
    panels = figure.subplots(lines, min(count, PANELS), squeeze=False).flatten()
    for ax in panels[count:]:
        ax.set_visible(False)
    return figure, list(panels[:count])


def alignment_figure(rows: Sequence[dict]) -> "Figure | None":
    """Draw a heat map for each stage that logs errors per layer; None without one."""
    names = [stage for stage in stages(rows, "train") if alignment(rows, stage)[1]]
    if not names:
        return None
    layers = max(len(alignment(rows, stage)[1]) for stage in names)
    figure = new_figure(WIDTH, (1.4 + 0.2 * min(max(layers, 4), 40)) * len(names))
    for ax, stage in zip(figure.subplots(len(names), 1, squeeze=False)[:, 0], names, strict=True):
        draw_alignment(ax, rows, stage)
    return figure


def validation_figure(rows: Sequence[dict]) -> "Figure | None":
    """Draw KL, cross entropies and agreement over the run, as far as there are any; None without evaluations."""
    scores = _measured(rows)
    if not scores:
        return None
    figure = new_figure(WIDTH, 3.0)
    for ax, (name, unit, log) in zip(figure.subplots(1, len(scores), squeeze=False)[0], scores, strict=True):
        draw_validation(ax, rows, name, unit, log=log)
    _shared_legend(figure)
    return figure


def runs_validation_figure(runs: Mapping[str, Sequence[dict]]) -> "Figure | None":
    """Draw KL, cross-entropy and agreement of several runs over one another; None without evaluations.

    Args:
        runs: name -> rows of metrics.jsonl.
    """
    measured = {name: rows for name, rows in runs.items() if of_kind(rows, "eval")}
    if not measured:
        return None
    scores = _measured([row for rows in measured.values() for row in rows])
    figure = new_figure(WIDTH, 3.4)
    for ax, (name, unit, log) in zip(figure.subplots(1, len(scores), squeeze=False)[0], scores, strict=True):
        values = []
        for (label, rows), color in zip(measured.items(), itertools.cycle(RUN_COLORS)):
            before, points = tokens_before(rows), _trained(of_kind(rows, "eval"))
            tokens = column(points, "tokens") + np.array([before[row["stage"]] for row in points])
            values.append(column(points, name))
            ax.plot(tokens, values[-1], "o-", color=color, markersize=3.5, linewidth=1.5, label=label)
            _end_value(ax, tokens[-1], values[-1][-1], color, ".3f")
        if log:
            _plain_log(ax, np.concatenate(values))
        _count_axis(ax.xaxis)
        _finish(ax, f"validation: {VALIDATION_TITLES[name]}", "tokens of the run", unit)
    _shared_legend(figure)
    return figure


def runs_loss_figure(runs: Mapping[str, Sequence[dict]]) -> "Figure | None":
    """Draw the smoothed training loss of several runs, one panel per stage; None if nothing was trained.

    Args:
        runs: name -> rows of metrics.jsonl.
    """
    names = list(dict.fromkeys(stage for rows in runs.values() for stage in stages(rows, "train")))
    if not names:
        return None
    figure, panels = _panels(len(names), 3.4)
    for ax, stage in zip(panels, names, strict=True):
        losses = []
        for (label, rows), color in zip(runs.items(), itertools.cycle(RUN_COLORS)):
            train = of_kind(rows, "train", stage)
            if train:
                loss = smooth(column(train, "loss"), max(1, len(train) // 25))
                ax.plot(column(train, "tokens"), loss, color=color, linewidth=1.5, label=label)
                _end_value(ax, train[-1]["tokens"], loss[-1], color)
                losses.append(loss)
        _plain_log(ax, np.concatenate(losses))
        _count_axis(ax.xaxis)
        _finish(ax, f"{stage}: training loss", "tokens", LOSS_UNITS.get(stage, "loss"))
    _shared_legend(figure)
    return figure


def _trained(measured: "list[dict]") -> "list[dict]":
    """Return evaluations without the one before any training, which would flatten all that follows."""
    return measured[1:] if len(measured) > 2 and not measured[0]["step"] else measured


def overview_figure(rows: Sequence[dict]) -> "Figure | None":
    """Draw losses, heat maps and validation on one page; None if there is nothing."""
    trained = stages(rows, "train")
    aligned = [stage for stage in trained if alignment(rows, stage)[1]]
    bands = [
        [lambda ax, stage=stage: draw_loss(ax, rows, stage) for stage in trained],
        [lambda ax, stage=stage: draw_alignment(ax, rows, stage) for stage in aligned],
        [
            lambda ax, name=name, unit=unit, log=log: draw_validation(ax, rows, name, unit, log=log)
            for name, unit, log in _measured(rows)
        ],
    ]
    bands = [band for band in bands if band]
    if not bands:
        return None
    figure = new_figure(13, 3.6 * len(bands))
    for subfigure, band in zip(np.atleast_1d(figure.subfigures(len(bands), 1)), bands, strict=True):
        for ax, draw in zip(subfigure.subplots(1, len(band), squeeze=False)[0], band, strict=True):
            draw(ax)
        _shared_legend(subfigure)
    return figure


def layers_figure(scores: dict[str, list[float]], method: str, kept: Sequence[int]) -> "Figure":
    """Draw how much attention is worth in each layer, one panel per method.

    Args:
        scores: of all layers by method.
        method: that has chosen.
        kept: the layers that it has chosen, in another color there.
    """
    from matplotlib.ticker import MaxNLocator

    count = max(map(len, scores.values()))
    figure = new_figure(max(5.0, 2.0 + 0.22 * count), 2.6 * len(scores))
    for ax, (name, values) in zip(figure.subplots(len(scores), 1, squeeze=False)[:, 0], scores.items(), strict=True):
        chosen = set(kept) if name == method else set()
        ax.bar(range(len(values)), values, color=[ORANGE if i in chosen else BLUE for i in range(len(values))])
        ax.axhline(0, color=GREY, linewidth=0.8)
        ax.xaxis.set_major_locator(MaxNLocator(min(count, 20), integer=True))
        title = f"{name}: layers {', '.join(map(str, sorted(chosen)))} keep attention" if chosen else name
        _finish(ax, title, "layer", LAYER_UNITS.get(name, "score"))
        ax.grid(False, axis="x")
    return figure


def position_figure(evaluation: dict) -> "Figure":
    """Draw perplexity of both models and KL by position.

    Args:
        evaluation: the JSON that `rwkvinside eval` writes.
    """
    figure = new_figure(WIDTH, 3.4)
    draw_positions(position_axes(figure, evaluation), evaluation)
    return figure


def position_axes(figure: "Figure | SubFigure", evaluation: dict) -> "Sequence[Axes]":
    """Return what `draw_positions` draws on: one of two axes stays empty for a model without a teacher."""
    axes = figure.subplots(1, 2)
    if "kl" not in evaluation:
        axes[1].remove()
    return axes


def draw_positions(axes: "Sequence[Axes]", evaluation: dict) -> None:
    """Draw perplexity of both models and KL by position, on two axes; of a model without a teacher its perplexity."""
    buckets = evaluation["by_position"]
    context = np.array([np.sqrt(bucket["first"] * bucket["last"]) for bucket in buckets])
    lines = [("perplexity", "student", BLUE, "o-")]
    drawn = [(axes[0], "perplexity by position", "perplexity")]
    if "kl" in evaluation:
        lines.append(("perplexity_teacher", "teacher", ORANGE, "s--"))
        drawn.append((axes[1], "divergence by position", "KL to the teacher (nats per token)"))
        axes[1].plot(context, [bucket["kl"] for bucket in buckets], "o-", color=BLUE, markersize=4)
        axes[1].set_ylim(bottom=0)
    for name, label, color, style in lines:
        axes[0].plot(context, [bucket[name] for bucket in buckets], style, color=color, markersize=4, label=label)
    _plain_log(axes[0], np.array([[bucket[name] for name, *_ in lines] for bucket in buckets]))
    for ax, title, unit in drawn:
        ax.set_xscale("log", base=2)
        _count_axis(ax.xaxis)
        _finish(ax, title, "tokens of the document already read", unit)
    _shared_legend(axes[0].figure)


# color by family, line style by member: a candidate looks the same in every figure
KERNEL_COLORS = {"triton": BLUE, "native": GREEN, "chunked": ORANGE, "reference": PINK, "loop": GREY, "fla": AMBER}
KERNEL_STYLES = {"high": "s--", "fast": "^-.", "fp32": "v:", "naive": "s--", "recurrent": "^-."}
KERNEL_PASSES = {"forward": "forward", "forward_backward": "forward and backward"}
SHAPE_SIZES = {"B": "batch size B", "T": "tokens T", "H": "heads H", "N": "head size N"}


def length_figure(lengths: "dict[str, np.ndarray]") -> "Figure":
    """Draw a histogram of the lengths of documents, one line per source.

    Args:
        lengths: tokens of each document, by source.
    """
    figure = new_figure(7, 3.2)
    ax = figure.subplots()
    shortest, longest = min(v.min() for v in lengths.values()), max(v.max() for v in lengths.values())
    edges = 2.0 ** np.arange(np.floor(np.log2(shortest)), np.log2(longest) + 0.5, 0.25)
    for (source, values), color in zip(lengths.items(), itertools.cycle((BLUE, ORANGE, GREEN, PINK, AMBER, BLACK))):
        ax.hist(values, bins=edges, histtype="step", linewidth=1.5, color=color, label=Path(source).name)
    ax.set_xscale("log", base=2)
    _count_axis(ax.xaxis)
    _finish(ax, "Lengths of documents", "tokens", "documents")
    _shared_legend(figure, columns=2)
    return figure


def draw_kernels(ax: "Axes", stage: dict, which: str) -> None:
    """Draw the times of all candidates of one stage of `rwkvinside bench wkv7`.

    The x axis is the one size in which the shapes differ; if several differ, the shapes are side by side and not joined
    by lines.

    Args:
        ax: where to draw.
        stage: as in the benchmark's JSON.
        which: pass, a key of `KERNEL_PASSES`.
    """
    from matplotlib.ticker import FuncFormatter, NullLocator

    shapes = stage["shapes"]
    varying = [size for size in SHAPE_SIZES if len({shape[size] for shape in shapes}) > 1] or ["T"]
    joined = len(varying) == 1
    positions = [shape[varying[0]] for shape in shapes] if joined else list(range(len(shapes)))
    drawn = []
    for name in dict.fromkeys(result["candidate"] for shape in shapes for result in shape["results"]):
        results = [next((r for r in shape["results"] if r["candidate"] == name), {}) for shape in shapes]
        times = column([result.get(which, {}) for result in results], "ms")
        if np.isnan(times).all():
            continue
        family, _, member = name.partition(":")
        style = KERNEL_STYLES.get(member, "o-")
        color = KERNEL_COLORS.get(family, BLACK)
        ax.plot(positions, times, style if joined else style[0], color=color, markersize=5, linewidth=1.5, label=name)
        drawn.append(times)
    _plain_log(ax, np.concatenate(drawn))
    if joined:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.set_xticks(positions)
        ax.xaxis.set_minor_locator(NullLocator())
    else:
        ax.set_xticks(positions, [", ".join(str(shape[size]) for size in varying) for shape in shapes], fontsize=8)
        ax.margins(x=0.08)
    fixed = ", ".join(f"{size} = {shapes[0][size]}" for size in SHAPE_SIZES if size not in varying)
    title = f"{stage['title']}, {stage['dtype']}: {KERNEL_PASSES[which]}" + (f" ({fixed})" if fixed else "")
    _finish(ax, title, SHAPE_SIZES[varying[0]] if joined else ", ".join(varying), "milliseconds")


def kernel_figure(stages: Sequence[dict], device: str) -> "Figure | None":
    """Draw the times of `rwkvinside bench wkv7`, one row per stage.

    Forward is on the left, forward with backward on the right.

    Args:
        stages: as in the benchmark's JSON: {"title", "dtype", "shapes"}.
        device: for the title.

    Returns:
        None if nothing ran.
    """

    def ran(stage: dict, which: str) -> bool:
        return any("ms" in result.get(which, {}) for shape in stage["shapes"] for result in shape["results"])

    stages = [stage for stage in stages if ran(stage, "forward")]
    if not stages:
        return None
    passes = [which for which in KERNEL_PASSES if any(ran(stage, which) for stage in stages)]
    figure = new_figure(1.5 + 6.2 * len(passes), 0.5 + 4.0 * len(stages))
    figure.suptitle(f"WKV-7 on {device}", fontsize=11, x=0.01, ha="left")
    lines = {}
    for stage, row in zip(stages, figure.subplots(len(stages), len(passes), squeeze=False, sharey="row"), strict=True):
        for ax, which in zip(row, passes, strict=True):
            ax.set_visible(ran(stage, which))
            if ax.get_visible():
                draw_kernels(ax, stage, which)
                lines |= {line.get_label(): line for line in ax.lines}
        for ax in row[1:]:
            ax.set_ylabel("")  # shared
    figure.legend(lines.values(), lines, loc="outside right upper", frameon=False, fontsize=9)
    return figure


CONTEXT_STYLES = {
    "attention": (ORANGE, "s--"),
    "hybrid": (GREEN, "^-."),
    "hybrid, window": (PINK, "v:"),
    "RWKV": (BLUE, "o-"),
}
CONTEXT_PANELS = (
    ("prefill_seconds", 1, "reading the prompt", "seconds"),
    ("token_ms", 1, "one further token", "milliseconds"),
    ("state_bytes", 2**20, "state after the prompt", "MiB"),
    ("prefill_peak_bytes", 2**20, "most memory while reading", "MiB beyond the weights"),
)


def context_figure(result: dict) -> "Figure":
    """Draw time and memory by the length of the context.

    Args:
        result: the JSON that `rwkvinside bench context` writes.
    """
    from matplotlib.ticker import FuncFormatter

    panels = [panel for panel in CONTEXT_PANELS if all(row[panel[0]] is not None for row in result["found"])]
    figure = new_figure(3.6 * len(panels), 3.4)
    for ax, (field, unit, title, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        values = []
        for name in dict.fromkeys(row["model"] for row in result["found"]):
            rows = [row for row in result["found"] if row["model"] == name]
            color, style = CONTEXT_STYLES.get(name, (BLACK, "x:"))
            values.append([row[field] / unit for row in rows])
            ax.plot([row["context"] for row in rows], values[-1], style, color=color, markersize=4, label=name)
        _plain_log(ax, np.concatenate(values))
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens / 1024:g}K"))
        _finish(ax, title, "tokens of the prompt", label)
    _shared_legend(figure)
    return figure
