"""What the figures show: the numbers of the file, labeled axes, and only the panels that a run can fill."""

import json

import numpy as np
import pytest

from rwkvinside.errors import UserError
from rwkvinside.report.figures import (
    BLUE,
    ORANGE,
    alignment_figure,
    context_figure,
    layers_figure,
    length_figure,
    loss_figure,
    overview_figure,
    position_figure,
    runs_validation_figure,
    smooth,
    validation_figure,
)
from rwkvinside.report.write import write_report

PNG = b"\x89PNG\r\n\x1a\n"


def measured(stage: str, tokens: int, kl: float, ce: float, agreement: float) -> dict:
    scores = {"kl": kl, "ce": ce, "ce_teacher": 3, "agreement": agreement}
    return {"kind": "eval", "stage": stage, "step": 30, "tokens": tokens, **scores}


@pytest.fixture
def rows() -> list[dict]:
    found = [measured("calibrate", 0, 2, 5, 0)]
    for step in range(1, 31):
        layers = {"0": 1 / step, "1": 0.5 / step}
        found.append(
            {"kind": "train", "stage": "align", "step": step, "tokens": 10 * step, "loss": 1 / step, "layers": layers}
        )
    found.append(measured("align", 300, 1, 4, 0.5))
    found.extend(
        {"kind": "train", "stage": "distill", "step": step, "tokens": 20 * step, "loss": 0.3} for step in range(1, 31)
    )
    found.append(measured("distill", 600, 0.5, 3.5, 0.9))
    return found


def write(run, rows) -> None:
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_loss_has_a_labeled_panel_per_stage_with_every_value(rows):
    axes = loss_figure(rows).axes
    assert [ax.get_title("left") for ax in axes] == ["align: training loss", "distill: training loss"]
    raw = axes[0].lines[0]
    assert raw.get_xdata().tolist() == [10 * s for s in range(1, 31)]
    assert np.allclose(raw.get_ydata(), [1 / s for s in range(1, 31)])
    assert all(ax.get_xlabel() == "tokens" and "(" in ax.get_ylabel() for ax in axes)


def test_heat_map_is_logarithmic_and_holds_layers_by_steps(rows):
    ax, bar = alignment_figure(rows).axes
    mesh = ax.collections[0]
    assert mesh.get_array().shape == (2, 30)
    assert np.allclose(np.asarray(mesh.get_array())[:, 9], [0.1, 0.05])
    assert (mesh.norm.vmin, mesh.norm.vmax) == pytest.approx((0.5 / 30, 1.0))
    assert type(mesh.norm).__name__ == "LogNorm"
    assert (ax.get_xlabel(), ax.get_ylabel(), bar.get_ylabel()) == ("step", "layer", "relative squared error")


def test_validation_runs_on_over_the_stages(rows):
    kl, ce, agreement = validation_figure(rows).axes
    assert kl.lines[0].get_xdata().tolist() == [0, 300, 900]
    assert [line.get_label() for line in ce.lines[:2]] == ["student", "teacher"]
    assert agreement.lines[0].get_ydata().tolist() == [0, 0.5, 0.9]


def test_a_model_from_nothing_has_its_own_cross_entropy_alone(rows):
    alone = [{k: v for k, v in row.items() if k not in ("kl", "ce_teacher", "agreement")} for row in rows]
    figure = validation_figure(alone)
    (ce,) = figure.axes
    assert ce.lines[0].get_ydata().tolist() == [5, 4, 3.5] and not figure.legends
    assert len(overview_figure(alone).axes) == len(overview_figure(rows).axes) - 2


CONTEXT = {"token_ms": 2.0, "state_bytes": 2**20, "prefill_peak_bytes": None}
LEGENDS = {  # what is labeled, by figure
    "validation": ["student", "control: teacher cut to windows", "teacher"],
    "loss": ["each logged step", "mean over 4 % of the steps"],
    "position": ["student", "teacher"],
    "lengths": ["a.jsonl", "b.jsonl"],
    "context": ["attention", "RWKV"],
    "runs": ["first", "second"],
}


def labeled(name, rows):
    """A figure whose curves fill its panels."""
    kept = [{"kind": "control", "stage": "calibrate", "step": 0, "tokens": 0, "kl": 1, "ce": 3.7, "agreement": 0.4}]
    train = [{"kind": "train", "stage": "sft", "step": n, "tokens": n, "loss": 1 + n % 2} for n in range(1, 61)]
    buckets = [{"first": 2**i, "last": 2**i, "perplexity": i, "perplexity_teacher": 9 - i, "kl": 1} for i in (1, 2, 8)]
    found = [{"model": m, "context": c, "prefill_seconds": c, **CONTEXT} for m in ("attention", "RWKV") for c in (1, 2)]
    return {
        "validation": lambda: validation_figure(kept + rows),
        "loss": lambda: loss_figure(train),
        "position": lambda: position_figure({"by_position": buckets, "kl": 1}),
        "lengths": lambda: length_figure({"a.jsonl": np.arange(1, 99), "b.jsonl": np.arange(1, 50)}),
        "context": lambda: context_figure({"found": found}),
        "runs": lambda: runs_validation_figure({"first": rows, "second": rows}),
    }[name]()


@pytest.mark.parametrize("name", LEGENDS)
def test_legends_lie_beside_the_panels_not_on_curves(rows, name):
    figure = labeled(name, rows)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == LEGENDS[name]
    figure.draw_without_rendering()
    assert not any(ax.get_legend() or legend.get_window_extent().overlaps(ax.get_window_extent()) for ax in figure.axes)


def test_each_band_of_an_overview_has_its_legend(rows):
    losses, errors, scores = overview_figure(rows).subfigs
    assert [len(band.legends) for band in (losses, errors, scores)] == [0, 0, 1]  # 30 steps are not averaged
    assert not any(ax.get_legend() for ax in scores.axes)


def test_validation_shows_the_control_of_a_windowed_student(rows):
    assert not any("control" in line.get_label() for ax in validation_figure(rows).axes for line in ax.lines)
    scores = {"kl": 4, "ce": 7, "ce_teacher": 3, "agreement": 0.25}
    axes = validation_figure([*rows, {"kind": "control", "stage": "calibrate", "step": 1, "tokens": 9, **scores}]).axes
    lines = [line for ax in axes for line in ax.lines if "control" in line.get_label()]
    assert [line.get_ydata()[0] for line in lines] == [4, 7, 0.25]
    assert axes[0].get_ylim()[1] > 4, "it is within the logarithmic axis"


def test_smoothing_never_looks_ahead():
    assert smooth(np.array([1.0, 3.0, 5.0, 7.0]), 2).tolist() == [1.0, 2.0, 4.0, 6.0]


def test_position_figure_shows_both_models():
    scores = {"perplexity": 9, "perplexity_teacher": 8, "kl": 0.1}
    buckets = [{"first": 2**k, "last": 2 ** (k + 1) - 1, **scores} for k in range(4)]
    left, right = position_figure({"kl": 0.1, "by_position": buckets}).axes
    assert [line.get_ydata().tolist() for line in left.lines] == [[9] * 4, [8] * 4]
    assert right.lines[0].get_ydata().tolist() == [0.1] * 4


def test_report_writes_what_the_run_can_answer(tmp_path, rows):
    run = tmp_path / "run"
    write(run, [row for row in rows if row["stage"] == "distill"])
    names = {path.relative_to(run).as_posix() for path in write_report(run)}
    figures = {f"figures/{name}.{form}" for name in ("training-loss", "validation") for form in ("svg", "pdf", "csv")}
    assert names == {"report.html", "report.png", *figures}
    assert {path.name for path in run.iterdir()} == {"metrics.jsonl", "report.html", "report.png", "figures"}
    assert (run / "report.png").read_bytes().startswith(PNG)


def test_a_run_without_steps_is_refused_and_writes_nothing(tmp_path):
    run = tmp_path / "run"
    write(run, [])
    with pytest.raises(UserError, match="no training step"):
        write_report(run)
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]


def test_layers_show_their_scores_and_which_were_chosen():
    from matplotlib.colors import to_hex

    scores = {"error": [0.1, 0.3, 0.2], "restore": [0.5, -0.1, 0.4]}
    figure = layers_figure(scores, "restore", (0, 2))
    for ax, values, kept in zip(figure.axes, scores.values(), ((), (0, 2)), strict=True):
        assert [bar.get_height() for bar in ax.patches] == values
        assert [to_hex(bar.get_facecolor()).upper() for bar in ax.patches] == [
            ORANGE if i in kept else BLUE for i in range(3)
        ]
    assert figure.axes[1].get_title(loc="left") == "restore: layers 0, 2 keep attention"
