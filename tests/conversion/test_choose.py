"""Runs that choose their layers: the choice is recorded, survives interruptions, and is what is exported."""

import itertools
import json
import random
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny import byte_tokenizer, save_qwen3
from transformers import AutoTokenizer

import rwkvinside as rw
import train_distill
from rwkvinside.cli.main import main as rwkvinside
from rwkvinside.config.resolve import resolve
from rwkvinside.config.schema import Config
from rwkvinside.conversion import choose
from rwkvinside.data.batch import IGNORE
from rwkvinside.errors import UserError
from rwkvinside.export.huggingface import export_hf
from rwkvinside.runs.directory import RunDirectory
from rwkvinside.runs.trained import at_stage, open_run
from rwkvinside.training.callbacks import WriteMetrics

CHOICE = "student.attention_layers={choose: restore, keep: 1}"
SMALL = [
    *(f"stages.{name}.data.seq_len=32" for name in ("calibrate", "align", "distill")),
    *(f"stages.{name}.batch.tokens=128" for name in ("calibrate", "align", "distill")),
    *("stages.calibrate.tokens=512", "stages.align.tokens=384", "stages.distill.tokens=384"),
]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A tiny Qwen3 of three layers with a byte-level tokenizer, and texts."""
    root = tmp_path_factory.mktemp("material")
    save_qwen3(root / "teacher", byte_tokenizer("<eos>", eos_token="<eos>"))
    draw = random.Random(0)
    for name, count in (("train", 100), ("val", 6)):
        texts = [" ".join(draw.choices(["the", "fox", "jumps", "over", "a", "dog"], k=20)) for _ in range(count)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return root


def train(material, out, *more):
    files = ["--teacher", material / "teacher", "--data", material / "train.jsonl", "--val", material / "val.jsonl"]
    cache = f"data.cache_dir={material / 'cache'}"
    return train_distill.main([*map(str, files), "--out", str(out), *SMALL, cache, *more])


def tensors(out, stage):
    return load_file(sorted((out / "stages" / stage).glob("step-*"))[-1] / "model.safetensors")


@pytest.fixture(scope="module")
def whole(material, tmp_path_factory):
    """A conversion in one go."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(material, out, CHOICE) == 0
    return out


def test_the_choice_is_in_records_plan_and_export(whole, tmp_path):
    directory = RunDirectory(whole)
    assert directory.finished() == ["calibrate", "align", "choose", "distill"]
    (kept,) = directory.records.chosen_layers()
    assert directory.records.kept_layers("align") is None and directory.records.kept_layers("distill") == (kept,)
    scores = json.loads((whole / "layers.json").read_text())["scores"]["restore"]
    assert max(range(3), key=lambda i: scores["layers"][i]) == kept
    assert (whole / "layers.png").stat().st_size > 1000
    rest = [i for i in range(3) if i != kept]
    assert json.loads((whole / "conversion.json").read_text())["student"]["rwkv_layers"] == rest
    assert "chosen in stage choose by restore" in (whole / "plan.txt").read_text()
    before, after = (
        {name.split(".")[2] for name in tensors(whole, stage) if ".w0" in name} for stage in ("align", "choose")
    )
    assert before == {"0", "1", "2"} and after == {str(i) for i in rest}
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    kl = {(row["stage"], row["step"]): row["kl"] for row in rows if row["kind"] == "eval"}
    assert kl["choose", 0] == pytest.approx(kl["align", 3], rel=1e-5)
    assert kl["choose", 1] == pytest.approx(scores["details"]["kl"][kept], rel=0.05)  # on part of that text
    assert at_stage(directory, "align").spec.attention_layers == () and open_run(whole).spec.attention_layers == (kept,)
    report = export_hf(whole, tmp_path / "export")
    assert report["attention_layers"] == [kept] and report["rwkv_layers"] == rest
    assert report["student"]["attention_layers"] == [kept]


@pytest.mark.parametrize("when", ["choosing", "distilling"])
def test_an_interrupted_run_goes_on_with_its_choice(material, whole, tmp_path, monkeypatch, capsys, when):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        if when == "choosing":
            patch.setattr(choose, "save_figure", lambda *_: (_ for _ in ()).throw(RuntimeError("power cut")))
        else:
            write = WriteMetrics.step

            def step(self, trainer, row):
                write(self, trainer, row)
                if (row["stage"], row["step"]) == ("distill", 2):
                    raise RuntimeError("power cut")

            patch.setattr(WriteMetrics, "step", step)
        with pytest.raises(RuntimeError, match="power cut"):
            train(material, out, CHOICE, "checkpoint.every_steps=1")
    capsys.readouterr()
    assert train(material, out, CHOICE, "checkpoint.every_steps=1", "--resume") == 0
    printed = capsys.readouterr().out
    assert ("are used again" in printed) == (when == "choosing")
    first, second = tensors(whole, "distill"), tensors(out, "distill")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    if when == "choosing":
        assert train(material, out, "student.attention_layers=[0]", "--resume") == 2
        assert "student.attention_layers" in capsys.readouterr().err


def test_layers_of_a_run_are_measured_once(material, whole, tmp_path, capsys):
    (kept,) = RunDirectory(whole).records.chosen_layers()
    assert rwkvinside(["layers", str(whole), "--keep", "1"]) == 0
    printed = capsys.readouterr().out
    assert "are used again" in printed and f"student.attention_layers=[{kept}]" in printed
    for method in ("error", "swap", "greedy"):
        assert rwkvinside(["layers", str(whole), "--keep", "2", "--choose", method, "--max-run", "1"]) == 0
        assert "student.attention_layers=[0,2]" in capsys.readouterr().out, "the only two that are not neighbors"
    assert set(json.loads((whole / "layers.json").read_text())["scores"]) == {"restore", "error", "swap", "greedy"}
    assert rwkvinside(["layers", str(whole), "--keep", "3"]) == 2
    assert "keeps all 3 layers" in capsys.readouterr().err
    text = (whole / "layers.json").read_text()
    (whole / "layers.json").write_text(text.replace('"tokens": ', '"tokens": 1'))
    assert rwkvinside(["layers", str(whole), "--keep", "1"]) == 2
    assert "was changed after it was written" in capsys.readouterr().err
    (whole / "layers.json").write_text(text)


def test_a_run_holds_out_the_same_text_of_data_without_an_end(whole, tmp_path, monkeypatch):
    asked, read = [], choose.tokens_of
    monkeypatch.setattr(choose, "tokens_of", lambda *arguments: asked.append(arguments[2]) or read(*arguments))
    rw.layers(shutil.copytree(whole, tmp_path / "run"), keep=1)
    plan = resolve(Config.model_validate(RunDirectory(whole).config()))
    assert asked == [plan.settings.endless_tokens] and asked[0] > 0


def test_short_distillations_go_on_where_they_were(whole, tmp_path, monkeypatch, capsys):
    runs = [shutil.copytree(whole, tmp_path / name) for name in ("stopped", "straight")]
    command = ["--keep", "1", "--distill", "512", "--tokens", "200"]
    with monkeypatch.context() as patch:
        write, done = choose.write_scores, []

        def power_cut(*arguments):
            write(*arguments)
            done.append(arguments)
            if len(done) == 6:
                raise RuntimeError("power cut")

        patch.setattr(choose, "write_scores", power_cut)
        with pytest.raises(RuntimeError, match="power cut"):
            rwkvinside(["layers", str(runs[0]), *command])
    for run in runs:
        capsys.readouterr()
        assert rwkvinside(["layers", str(run), *command]) == 0
        printed = capsys.readouterr().out
        assert (f"6 trials of {run / 'layers.json'} are used again" in printed) == (run is runs[0])
        assert "on 64, 128, 256, 512 tokens" in printed and "kl@64" in printed
        for stage in ("align", "choose", "distill"):
            before, after = tensors(whole, stage), tensors(run, stage)
            assert all(torch.equal(before[name], after[name]) for name in before)
    first, second = (json.loads((run / "layers.json").read_text()) for run in runs)
    assert first["scores"] == second["scores"] and first["trials"] == second["trials"]
    assert first["scores"]["restore+distill"]["details"]["kl@0"] == pytest.approx(
        first["scores"]["restore"]["details"]["kl"], rel=0.1
    )
    found = rw.layers(runs[0], keep=1, distill=512, tokens=200)
    assert found["scores"] == first["scores"]["restore+distill"]["layers"]


def test_a_run_chooses_by_short_distillations(material, tmp_path, monkeypatch, capsys):
    out, choice = tmp_path / "run", CHOICE.replace("keep: 1", "keep: 1, distill: 256")
    settings = [choice, "run=[calibrate,choose]"]
    with monkeypatch.context() as patch:
        clock = itertools.count(step=11)  # what takes long passes 11 seconds between two looks at the clock
        patch.setattr("rwkvinside.support.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
        assert train(material, out, *settings) == 0
    printed = capsys.readouterr().out
    assert "restore+distill 0/20 steps  4/20 forwards of scoring\n" in printed, "the untrained students"
    assert re.search(r"restore\+distill [1-9]\d*/20 steps  ETA 0:", printed)
    (kept,) = RunDirectory(out).records.chosen_layers()
    assert f"layers {kept} keep their attention, by restore+distill" in printed
    plan = (out / "plan.txt").read_text()
    assert "4 x 640 = 2.56 K tokens at most" in plan and "of it for trials" in plan and " + start " in plan
    expected = {stage["name"]: stage for stage in json.loads((out / "plan.json").read_text())["stages"]}
    assert expected["choose"]["memory"]["optimizer"] > 0
    assert train(material, out, *settings, "stages.distill.objective=sft", "--resume", "--allow-changes") == 2
    assert "trains as stages.distill says, whose objective is sft" in capsys.readouterr().err


def test_rows_of_the_recall_ask_for_values_that_were_said(material):
    batch = choose.recall_rows(AutoTokenizer.from_pretrained(material / "teacher"))
    assert batch.num_targets >= 16 * 8
    for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        for at in (at for at, label in enumerate(labels) if label != IGNORE):
            assert ids[at + 1] == labels[at]
            asked = tuple(ids[at - 1 : at + 2])  # key, ":", value
            assert any(tuple(ids[i : i + 3]) == asked for i in range(at - 3)), "said before"


def test_layers_of_a_teacher(material, tmp_path, capsys):
    out = tmp_path / "run"
    files = ("--teacher", "teacher"), ("--data", "train.jsonl"), ("--val", "val.jsonl")
    teacher = [word for flag, name in files for word in (flag, str(material / name))]
    own = ["student.window=4", f"data.cache_dir={material / 'cache'}"]
    assert rwkvinside(["layers", *teacher, "--keep", "1", "--out", str(out), "--tokens", "1k", *own]) == 0
    assert "student.attention_layers=[" in capsys.readouterr().out
    assert RunDirectory(out).finished() == ["calibrate"]
    for arguments, cause in (
        (["--keep", "1"], "give one run, or a teacher"),
        ([str(out), "student.window=4", "--keep", "1"], "settings are for --teacher"),
        ([str(out), *teacher, "--keep", "1"], "give one run, or a teacher"),
        ([*teacher, "--keep", "1"], "--teacher needs --out"),
        ([str(out), "--keep", "1", "--choose", "restor"], "did you mean restore?"),
        ([str(out), "--keep", "1", "--choose", "uniform"], "uniform measures nothing"),
        ([str(tmp_path), "--keep", "1"], "is not a run directory"),
    ):
        assert rwkvinside(["layers", *arguments]) == 2
        assert cause in capsys.readouterr().err
    for arguments, cause in (  # before a student is calibrated for it
        (["--keep", "9"], "the choice has keep = 9"),
        (["--keep", "1", "--choose", "restor"], "did you mean restore?"),
        (["--keep", "1", "--choose", "uniform"], "uniform measures nothing"),
    ):
        assert rwkvinside(["layers", *teacher, *own, "--out", str(tmp_path / "new"), *arguments]) == 2
        assert cause in capsys.readouterr().err and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "overrides, cause",
    [
        (["run=[calibrate,choose,distill]", "stages.choose.objective=choose"], "student.attention_layers names []"),
        ([CHOICE, "run=[calibrate,choose,again]", "stages.again.objective=choose"], "chooses layers twice"),
        ([CHOICE, "run=[distill,choose]"], "needs the teacher's own weights"),
        ([CHOICE, "adapters=[{groups: [mlp], rank: 2}]"], "quantized layers or adapters"),
        ([CHOICE, "stages.choose.train=[mixer]"], "objective choose does not train"),
    ],
)
def test_choices_that_cannot_be(material, tmp_path, capsys, overrides, cause):
    assert train(material, tmp_path / "run", *overrides) == 2
    assert cause in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_stage_that_chooses_can_have_any_place_and_name(material, tmp_path, capsys):
    own = ["run=[calibrate,pick,align,distill]", "stages.pick={objective: choose, tokens: 2k}"]
    assert train(material, tmp_path / "run", CHOICE, *own, "--dry-run") == 0
    assert "pick (choose): 2 K tokens" in capsys.readouterr().out
    with pytest.raises(UserError, match="has no stage"):
        RunDirectory(tmp_path).stage("../pick")
