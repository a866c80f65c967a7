"""The whole demo in its quick form, and what it refuses."""

import json

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from rwkvinside.cli.main import main
from rwkvinside.demo import run as command
from rwkvinside.demo.corpus import Corpus, collect
from rwkvinside.demo.tables import show_speed, slowdown
from rwkvinside.evaluate.decode_speed import DecodeSpeed


def test_quick_demo_from_text_to_a_student_that_generates(tmp_path, monkeypatch, capsys):
    whole = collect()
    monkeypatch.setattr(command, "collect", lambda: Corpus(whole.train[:300], whole.val[:12]))
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--quick"]) == 0

    result = json.loads((out / "demo.json").read_text())
    assert list(result["stages"]) == ["calibrate", "align", "distill"]
    distill = result["stages"]["distill"]
    assert 0 < distill["kl"] < result["stages"]["calibrate"]["kl"]
    assert distill["ce"] - distill["ce_teacher"] < 0.25
    assert {(row["model"], row["context"]) for row in result["decode_speed"]} == {
        (model, context) for model in ("teacher", "student") for context in command.QUICK.contexts
    }
    assert (out / "run" / "report.png").read_bytes().startswith(b"\x89PNG")
    page = out / "run" / "report.html"
    assert "By position" in page.read_text()
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == f"report: {page}"
    for part in ("after calibrate", "after align", "after distill", "def read_lines", "time of one generated token"):
        assert part in said

    tokenizer = AutoTokenizer.from_pretrained(out / "student")
    student = AutoModelForCausalLM.from_pretrained(out / "student", trust_remote_code=True)
    inputs = tokenizer("def ", return_tensors="pt")
    assert student.generate(**inputs, max_new_tokens=5, min_new_tokens=5).shape[1] == inputs["input_ids"].shape[1] + 5

    # a second demo in the same folder makes room for itself and keeps the teacher
    teacher = (out / "teacher" / "model.safetensors").stat().st_mtime_ns
    again = command.Demo(out, command.QUICK, Console(quiet=True))
    again._claim_folder()
    assert not (out / "run").exists() and not (out / "student").exists()
    again._prepare()
    assert (out / "teacher" / "model.safetensors").stat().st_mtime_ns == teacher


def test_a_folder_with_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "not the folder of a demo" in capsys.readouterr().err
    assert (tmp_path / "run" / "mine.txt").read_text() == "mine"


def test_full_settings_are_a_valid_configuration(tmp_path, shared):
    """Overrides of both versions name fields that exist; any teacher will do for that."""
    from rwkvinside.config.load import load_config

    for settings in (command.FULL, command.QUICK):
        config = load_config(teacher=str(shared / "teachers" / "stories260k"), overrides=settings.overrides)
        assert config.run == list(command.STAGES)


def test_slowdown_compares_the_students_longest_and_shortest_context(capsys):
    rows = [
        DecodeSpeed("teacher", 512, 1.0, 0.1),
        DecodeSpeed("teacher", 4096, 9.0, 0.1),
        DecodeSpeed("student", 512, 2.0, 0.1),
        DecodeSpeed("student", 4096, 2.2, 0.1),
    ]
    assert slowdown(rows) == pytest.approx(1.1)
    show_speed(Console(), rows)
    said = capsys.readouterr().out
    assert "9.00 ms" in said and "after 4,096 tokens" in said and "x1.10" in said
