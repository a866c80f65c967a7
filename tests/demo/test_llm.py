"""The demo of a language model on tiny teachers: on what they write, on given texts, and what it shows."""

import json

import pytest
from tiny import byte_tokenizer, save_qwen3, save_texts

from rwkvinside.cli.main import main
from rwkvinside.config.load import load_config
from rwkvinside.demo.llm import FULL, QUICK

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("llm") / "teacher"
    tokenizer = byte_tokenizer("<|im_start|>", "<|im_end|>", "<eos>", eos_token="<eos>", chat_template=CHATML)
    save_qwen3(path, tokenizer, max_position_embeddings=512)
    return path


@pytest.mark.integration
def test_on_what_the_teacher_writes(teacher, tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--quick", "--teacher", str(teacher), "--out", str(out)]) == 0
    result = json.loads((out / "demo.json").read_text())
    names = ["teacher", "teacher cut to the window", "after calibrate", "after align", "after distill"]
    assert list(result["scores"]) == names
    *untrained, aligned, distilled = (row["tokens"] for row in result["scores"].values())
    assert untrained == [0, 0, 0]
    assert 256 - 64 < aligned <= 256 < distilled <= 512, "an epoch's last row, which has padding, may be among them"
    assert result["scores"]["teacher"]["kl"] == 0 < result["scores"]["after distill"]["kl"]
    assert list(result["samples"]) == ["teacher", "after calibrate", "after distill"]
    assert all(set(turn) == {"answer", "continuation"} for turn in result["samples"].values())
    said = capsys.readouterr().out
    for part in ("the teacher writes", "window of 64 tokens", "capital of France", "teacher cut to the window"):
        assert part in said, part
    text = out / "text-of-teacher.jsonl"
    written = text.stat().st_mtime_ns
    assert main(["demo", "--quick", "--teacher", str(teacher), "--out", str(out), "run=[calibrate]"]) == 0
    assert text.stat().st_mtime_ns == written  # kept for the next demo
    assert list(json.loads((out / "demo.json").read_text())["scores"]) == names[:3]


@pytest.mark.integration
def test_on_given_texts(teacher, tmp_path):
    save_texts(tmp_path / "texts.jsonl", 200)
    argv = ["demo", "--quick", "--teacher", str(teacher), "--out", str(tmp_path / "demo"), "run=[calibrate]"]
    assert main([*argv, "--data", str(tmp_path / "texts.jsonl"), "data.val_fraction=0.2"]) == 0
    assert not list((tmp_path / "demo").glob("*.jsonl"))


def test_both_sizes_are_configurations():
    for settings in (FULL, QUICK):
        config = load_config(teacher="SmolLM2-135M", recipe="windowed", overrides=settings.overrides)
        assert config.run[0] == "calibrate" and config.run[-1] == "distill"


def test_what_is_for_a_teacher_needs_one(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path), "seed=1"]) == 2
    assert "name it with --teacher" in capsys.readouterr().err
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["demo", "--out", str(tmp_path), "--teacher", "Qwen3-0.6B"]) == 2
    assert "not the folder of a demo" in capsys.readouterr().err
