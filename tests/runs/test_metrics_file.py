"""Reading metrics.jsonl: what a kill leaves behind, damage, and the columns of the plots."""

import json

import numpy as np
import pytest

from rwkvinside.errors import UserError
from rwkvinside.report.write import write_report
from rwkvinside.runs.metrics_file import alignment, read_metrics, stages, tokens_before


def train(stage: str, step: int, **more) -> dict:
    return {"kind": "train", "stage": stage, "step": step, "tokens": step * 10, "loss": 1.0, **more}


def test_a_row_that_was_being_written_is_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps(train("align", 1)) + "\n" + '{"kind": "tra')
    assert read_metrics(file) == [train("align", 1)]


def test_damage_names_the_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"kind": "train"}\n{"kind": \n{"kind": "eval"}\n')
    with pytest.raises(UserError, match="line 2"):
        read_metrics(file)
    file.write_text("[1]\n")
    with pytest.raises(UserError, match="line 1 is not a JSON object"):
        read_metrics(file)
    with pytest.raises(UserError, match="does not exist"):
        read_metrics(tmp_path / "other.jsonl")


@pytest.mark.parametrize(
    "line, said",
    [
        (b'{"kind": "train", "stage": 3, "step": 1, "tokens": 1}', "is of stage 3, not a name"),
        (b'{"kind": "eval", "stage": "align", "tokens": 1}', "has step = None"),
        (b'{"kind": "train", "stage": "align", "step": 1, "tokens": "x"}', "has tokens = 'x'"),
        (b'{"kind": "train", "stage": "align", "step": 1, "tokens": 1, "loss": "low"}', "has loss = 'low'"),
        (b'{"kind": "train", "stage": "align", "step": 1, "tokens": 1, "layers": [1]}', "has layers = "),
        (b'{"kind": "train", "stage": "align", "step": 1, "tokens": 1, "layers": {"x": 1}}', "has layers = "),
        (b'{"loss": ' + b"9" * 400 + b"}", "has loss = 999"),
        (b'{"loss": ' + b"9" * 5000 + b"}", "4300 digits"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\xff\xfe", "can't decode byte"),
    ],
)
def test_a_bad_row_is_named(tmp_path, line, said):
    """By `report`, which would fail over it, before anything is drawn."""
    (tmp_path / "metrics.jsonl").write_bytes(json.dumps(train("align", 1)).encode() + b"\n" + line + b"\n")
    with pytest.raises(UserError, match=rf"metrics.jsonl, line 2.*{said}") as caught:
        write_report(tmp_path)
    assert "\n" not in caught.value.cause


def test_stages_stand_one_after_another_on_the_axis():
    calibrated = {"kind": "eval", "stage": "calibrate", "tokens": 0}
    rows = [calibrated, train("align", 1), train("align", 3), train("distill", 2)]
    assert tokens_before(rows) == {"calibrate": 0, "align": 0, "distill": 30}
    assert stages(rows, "train") == ["align", "distill"]


def test_alignment_takes_the_geometric_mean_of_the_steps_of_a_column():
    rows = [train("align", s, layers={"2": e, "10": 8.0}) for s, e in ((5, 1.0), (10, 4.0), (15, 3.0), (20, 3.0))]
    steps, layers, errors = alignment(rows, "align", columns=2)
    assert steps.tolist() == [10, 20]
    assert layers == [2, 10]  # by number, not by spelling
    assert np.allclose(errors, [[2.0, 3.0], [8.0, 8.0]])


def test_a_layer_that_starts_later_is_nan_before():
    rows = [train("align", 1, layers={"0": 1.0}), train("align", 2, layers={"0": 1.0, "1": 2.0})]
    _, layers, errors = alignment(rows, "align")
    assert layers == [0, 1]
    assert np.isnan(errors[1, 0]) and np.isclose(errors[1, 1], 2.0)
