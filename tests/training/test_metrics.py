import io
import json
import math

import pytest

from rwkvinside.errors import UserError
from rwkvinside.training.metrics import Console, MetricsWriter


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_lines_of_json(tmp_path):
    writer = MetricsWriter(tmp_path / "run")
    writer.write({"kind": "train", "stage": "align", "step": 1, "loss": 0.5, "layers": {"0": math.nan}})
    writer.write({"kind": "eval", "stage": "align", "step": 1, "kl": math.inf})
    assert rows(writer.path) == [
        {"kind": "train", "stage": "align", "step": 1, "loss": 0.5, "layers": {"0": None}},
        {"kind": "eval", "stage": "align", "step": 1, "kl": None},
    ]


def test_a_resumed_stage_forgets_what_it_will_write_again(tmp_path):
    writer = MetricsWriter(tmp_path)
    for stage in ("align", "distill"):
        for step in (1, 2, 3):
            writer.write({"stage": stage, "step": step})
    with writer.path.open("a") as file:
        file.write('{"stage": "distill", "st')  # killed while writing
    writer.begin("distill", 2)
    left = [(row["stage"], row["step"]) for row in rows(writer.path)]
    assert left == [("align", 1), ("align", 2), ("align", 3), ("distill", 1), ("distill", 2)]
    writer.begin("align")
    assert [(row["stage"], row["step"]) for row in rows(writer.path)] == [("distill", 1), ("distill", 2)]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


ROW = {"loss": 0.25, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_s": 1234.5, "memory_mb": 99.0}


def test_console_lines():
    stream = io.StringIO()
    with Console("align", 5, every=2, stream=stream) as console:
        for step in range(1, 6):
            console.step(ROW | {"step": step}, seconds_left=3725)
        console.evaluation({"kind": "eval", "stage": "align", "step": 5, "tokens": 10, "kl": 0.125, "time": 1.0})
    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["align 2/5", "align 4/5", "align 5/5", "align 5/5"]
    assert lines[0].endswith("loss 0.25  1,234 tokens/s  ETA 1:02:05")
    assert lines[-1].endswith("eval: kl 0.125")


def test_the_console_shows_mfu_where_the_peak_is_known():
    stream = io.StringIO()
    with Console("align", 1, stream=stream) as console:
        console.step(ROW | {"step": 1, "mfu": 0.4237}, seconds_left=0)
    assert "1,234 tokens/s  MFU 42 %  ETA" in stream.getvalue()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_has_a_live_bar():
    stream = Terminal()
    with Console("align", 2, every=1, stream=stream) as console:
        console.step(ROW | {"step": 1}, seconds_left=1)
    assert "align 1/2  loss 0.25" in stream.getvalue()
    assert "\x1b[" in stream.getvalue()  # drawn and redrawn


def test_no_space_for_a_row_is_one_clear_line(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.path.symlink_to("/dev/full")  # a device on which every write finds no space
    with pytest.raises(UserError, match="metrics.jsonl: No space left on device"):
        writer.write({"kind": "train", "step": 1})


def test_no_space_to_begin_a_stage_again_loses_nothing(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write({"kind": "train", "stage": "align", "step": 1})
    before = writer.path.read_text()
    writer.path.with_name(f".{writer.path.name}.unfinished").symlink_to("/dev/full")
    with pytest.raises(UserError, match="metrics.jsonl: No space left on device"):
        writer.begin("distill")
    assert writer.path.read_text() == before and [p.name for p in tmp_path.iterdir()] == [writer.path.name]
