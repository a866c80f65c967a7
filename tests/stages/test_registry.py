"""Objectives by name: those that are shipped, and one that somebody adds."""

import json

import pytest
from tiny import byte_tokenizer, save_configuration, save_qwen3

from rwkvinside.config.load import load_config
from rwkvinside.config.resolve import resolve
from rwkvinside.conversion.run import train
from rwkvinside.errors import UserError
from rwkvinside.stages import registry
from rwkvinside.stages.base import Stage


@pytest.mark.parametrize("objective", registry.OBJECTIVES)
def test_an_objective_is_known_by_its_name(objective):
    found = registry.objective_class(objective)
    assert issubclass(found, Stage) and found.objective == objective
    assert found.small.seq_len <= found.large.seq_len


def test_stages_that_are_there_have_defaults_of_their_own():
    assert registry.find_stage_class("long", None).objective == "distill"
    assert registry.find_stage_class("long", None) is not registry.find_stage_class("distill", None)
    assert registry.find_stage_class("mine", "distill") is registry.find_stage_class("distill", None)
    assert registry.find_stage_class("long", "sft") is registry.find_stage_class("sft", None)
    assert registry.find_stage_class("mine", None) is None and registry.find_stage_class("mine", "distil") is None


def test_a_new_objective_is_one_file_and_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(registry.OBJECTIVES, "echo", "echo_stage:Echo")
    save_qwen3(tmp_path / "teacher", byte_tokenizer("<eos>", eos_token="<eos>"))
    texts = "".join(json.dumps({"text": f"{i} green bottles hanging on the wall"}) + "\n" for i in range(40))
    (tmp_path / "train.jsonl").write_text(texts)
    config = load_config(
        teacher=str(tmp_path / "teacher"),
        data=[str(tmp_path / "train.jsonl")],
        out=str(tmp_path / "run"),
        overrides=["run=[mine]", "stages.mine.objective=echo", "data.val_fraction=0.1", f"data.cache_dir={tmp_path}/c"],
    )
    assert config.stages["mine"].length.steps == 2 and config.stages["mine"].optim.lr == 1e-3
    train(config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["train", "train", "eval", "sample"] and rows[0]["loss"] > 1
    assert "mine (echo): 256 tokens in rows of 32" in (tmp_path / "run" / "plan.txt").read_text()


def test_plans_are_resolved_once(tmp_path):
    teacher = save_configuration(tmp_path / "tiny")
    overrides = ["stages.align.tokens=10k", "stages.align.batch.tokens=4096", "device=cpu"]
    config = load_config(teacher=teacher, overrides=overrides)
    run = resolve(config, ["sft"], ranks=4)
    assert [plan.name for plan in run.stages] == ["calibrate", "align", "distill", "sft"] and run.selected == ("sft",)
    align, calibrate = run.stage("align"), run.stage("calibrate")
    assert (align.length.steps, align.row_count, align.shape.rows, align.shape.ranks) == (3, 48, 16, 4)
    assert calibrate.shape.ranks == 1 and not calibrate.stage.trains  # one process fits
    assert align.run is calibrate.run and align.run.precision == "fp32"
    with pytest.raises(UserError, match="there is no stage 'polish'"):
        resolve(config, ["polish"])
