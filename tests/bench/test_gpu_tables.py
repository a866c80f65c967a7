"""The GPU tables of docs/benchmarks.md, from results."""

import json
from pathlib import Path

from rwkvinside.bench.gpu_session import tables as module
from rwkvinside.bench.gpu_session.results import read
from rwkvinside.bench.gpu_session.tables import BEGIN, END, PAGE, tables
from rwkvinside.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
MEASUREMENTS = ROOT / "docs" / "measurements"


def test_the_page_has_what_the_newest_results_say():
    text = (ROOT / PAGE).read_text()
    newest = max(MEASUREMENTS.glob("*.jsonl"), key=lambda file: file.stem[-10:])
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip() == tables(read(newest)).strip()


def test_committed_results_name_their_origin_and_no_path():
    for file in MEASUREMENTS.rglob("*.jsonl"):
        about, *found = read(file)
        assert about["stage"] == "session" and {"card", "date", "commit", "torch", "triton"} <= about.keys()
        assert found and about["date"] == file.stem[-10:]
        assert not [word for word in ("/home/", "/root/", "/tmp/", "/work/") if word in file.read_text()]


def test_what_was_not_measured_has_no_table():
    text = tables([{"stage": "facts", "what": "card", "name": "A card"}])
    assert "A card" in text and "unknown" in text and "|" not in text


def test_checks_that_fail_are_seen():
    lines = [
        {"what": "float64 1,700,3,64 fast BV=16", "distances": {"y": 1e-3}, "limit": 1e-2, "ok": True},
        {"what": "float64 1,700,3,64 fast BV=64", "distances": {"y": 2e-3, "dr": "nan"}, "limit": 1e-2, "ok": False},
        {"what": "one key", "distances": {"y": 3e-3}, "limit": 4e-2, "ok": True},
        {"what": "packed", "error": "RuntimeError: x"},
    ]
    text = tables([{"stage": "correct", **line} for line in lines])
    assert "| fast | 64 | 2 | inf | 0.01 | **no** |" in text
    assert "| one key | 3.0e-3 | 0.04 | yes |" in text
    assert "packed" not in text


def test_the_best_setting_of_a_peer_and_configurations_of_several_lines():
    what, tried = "fla:chunk B=1 T=2 H=3 N=4", {"stage": "peers", "tried": 2}
    lines = [
        {**tried, "what": f"{what} a", "forward_ms": 1.0, "forward_backward_ms": 5.0},
        {**tried, "what": f"{what} b", "forward_ms": 2.0, "forward_backward_ms": 4.0},
        {"stage": "kernels", "what": "configurations grad 1,2,3,4 balanced 0-7", "failed": ["x"], "fastest": []},
        {
            "stage": "kernels",
            "what": "configurations grad 1,2,3,4 balanced 8-9",
            "failed": [],
            "fastest": [{"ms": 2.0, "with": "L=16"}, {"ms": 3.0, "with": "L=32"}],
        },
    ]
    text = tables(lines)
    assert "| 1,2,3,4 | - | 2 / 4 (b) | - | - |" in text and "tried 2 of its" in text
    assert "| grad | 1,2,3,4 | 2 (1 failed) | 2: L=16; 3: L=32 |" in text


def test_launches_that_only_some_cases_have_get_a_column():
    row = {"ms": 1.0, "floor_ms": 0.5}
    alone = {"stage": "kernels", "what": "time 1,2,3,4 balanced", "launches": {"backward gradient": row}}
    shared = {**alone, "what": "time 5,6,7,8 balanced G=1", "launches": {"backward sum_heads": row}}
    assert "sum of heads" not in tables([{**alone, "launched_ms": 1.0}])
    text = tables([{**line, "launched_ms": 1.0} for line in (alone, shared)])
    assert "| gradient | sum of heads | all |" in text
    assert "| 1 (0.5) | - | 1 |" in text and "| - | 1 (0.5) | 1 |" in text


def test_training_and_generation_have_tables_once_measured():
    speed = {"tokens_per_s": 12345.6, "mfu": 0.25, "peak_gib": 9.0, "predicted_gib": 8.5}
    cost = {"prefill_tokens_per_s": 1e5, "ms_per_token": 2.0, "cache_bytes": 3 * 2**20}
    graphed = {"eager_ms": 2.5, "graphed_ms": 0.5}
    lines = [{"stage": "training", "what": "align", **speed}]
    lines += [{"stage": "generation", "what": "student", **more} for more in (cost, graphed)]
    text = tables(lines)
    assert "| align | 12,346 | 25.0 % | 9 | 8.5 |" in text and "| student | 100,000 | 2 | 3.0 |" in text
    assert "| student | 2.5 | 0.5 |" in text


def test_the_command_writes_between_the_markers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "PACKAGE", tmp_path / "rwkvinside")
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps({"stage": "facts", "what": "card", "name": "A card"}) + "\n")
    (tmp_path / "docs").mkdir()
    page = tmp_path / PAGE
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert main(["bench", "gpu", "--write-docs", str(results)]) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n") and text.endswith(f"{END}\nafter\n")
    assert "A card" in text and "old" not in text
    page.write_text("no markers\n")
    assert main(["bench", "gpu", "--write-docs", str(results)]) == 2
    assert "lacks" in capsys.readouterr().err
    assert main(["bench", "gpu", "--write-docs", str(tmp_path / "absent.jsonl")]) == 2


def test_one_of_measuring_and_writing_docs_is_asked_for(tmp_path):
    assert main(["bench", "gpu", "--out", str(tmp_path), "--write-docs", "x"]) == 2
    assert main(["bench", "gpu"]) == 2
