"""A run directory that was edited or mixed with another, or whose teacher was: refused when it is used, in one line."""

import json
import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, save_qwen3, save_texts

import train_distill
from rwkvinside.cli.main import main
from rwkvinside.errors import UserError
from rwkvinside.export import manifest
from rwkvinside.runs.directory import RunDirectory
from rwkvinside.runs.trained import open_run
from rwkvinside.support import digests
from rwkvinside.support.lock import LOCK, locked
from rwkvinside.support.sealed import sealed_text
from rwkvinside.training.frozen_weights import NAME as FROZEN

pytestmark = [pytest.mark.integration, pytest.mark.faults("edited and mixed runs")]

STAGES = ("calibrate", "align", "distill")
SMALL = [
    "stages.calibrate.tokens=256",
    *(f"stages.{name}.tokens=384" for name in STAGES[1:]),
    *(f"stages.{name}.{field}" for name in STAGES for field in ("data.seq_len=32", "batch.tokens=128")),
    "checkpoint={every_steps: 1, keep: 9}",
    "quantize={groups: [mlp, teacher]}",
    "stages.distill.train=[mixer]",
]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    root = tmp_path_factory.mktemp("material")
    save_qwen3(root / "teacher", byte_tokenizer("<eos>", eos_token="<eos>"))
    for name in ("train", "val"):
        save_texts(root / f"{name}.jsonl")
    return root


def train(material, out, *more, teacher="teacher"):
    files = ["--teacher", material / teacher, "--data", material / "train.jsonl", "--val", material / "val.jsonl"]
    argv = [*map(str, files), "--out", str(out), *SMALL, f"data.cache_dir={material / 'cache'}", *map(str, more)]
    return train_distill.main(argv)


@pytest.fixture(scope="module")
def finished(material, tmp_path_factory):
    """A run with all of its stages; quantized weights in each, checkpoints at every step."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert train(material, out) == 0
    return out


@pytest.fixture(scope="module")
def other(material, tmp_path_factory):
    """Another run with the same settings."""
    out = tmp_path_factory.mktemp("other") / "run"
    assert train(material, out) == 0
    return out


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def content(folder):
    """Every file below a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def claims(run, *stages):
    """Let conversion.json say which stages are finished."""
    file = run / "conversion.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"finished_stages": list(stages)}))


def interrupted(run):
    """Make of a finished run one that stopped after the first step of distill."""
    for step in (2, 3):
        shutil.rmtree(run / "stages" / "distill" / f"step-0000000{step}")
    claims(run, "calibrate", "align")
    return run


def flip(file):
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)


def refused(capsys, *causes):
    """What was printed: one line of cause and one of hint."""
    err = capsys.readouterr().err
    assert err.startswith("error: ") and len(err.splitlines()) == 2, err
    for cause in causes:
        assert cause in err


# The teacher


@pytest.fixture
def replaced(material, finished, tmp_path):
    """A run whose teacher lies beside it and can be changed."""
    teacher = shutil.copytree(material / "teacher", tmp_path / "teacher")
    run = shutil.copytree(finished, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["teacher"]["path"] = str(teacher)  # a moved teacher is the same teacher
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run, teacher


def other_weights(teacher):
    tensors = load_file(teacher / "model.safetensors")
    save_file({name: t + 1e-3 for name, t in tensors.items()}, teacher / "model.safetensors", {"format": "pt"})


def other_configuration(teacher):
    fields = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(fields | {"rms_norm_eps": 1e-2}))


def other_tokenizer(teacher):
    file = teacher / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"note": 1}))


@pytest.mark.parametrize(
    "change, what",
    [(other_weights, "weights"), (other_configuration, "configuration"), (other_tokenizer, "tokenizer")],
)
def test_another_teacher_is_refused_by_everything_that_uses_it(replaced, material, tmp_path, capsys, change, what):
    run, teacher = replaced
    assert open_run(run).id
    exported = tmp_path / "exported"  # as far as verify reads it before the run
    exported.mkdir()
    (exported / "config.json").write_text('{"dtype": "float32"}')
    (exported / "conversion.json").write_text(sealed_text({"files": manifest.digests(exported)}))
    change(teacher)
    before = content(run)
    commands = [["export", run, "--out", tmp_path / "again"], ["eval", run, "--data", material / "val.jsonl"]]
    for command in [*commands, ["verify", exported, "--against", run]]:
        assert main([str(word) for word in command]) == 2
        refused(capsys, f"teacher {teacher} is not the one that the run was begun with: its {what} changed")
    interrupted(run)
    kept = content(run)
    assert train(tmp_path, run, "--resume", "--allow-changes", *material_data(material)) == 2
    refused(capsys, f"its {what} changed")
    assert content(run) == kept and not (tmp_path / "again").exists()
    assert before["run.json"] == kept["run.json"]


def material_data(material):
    """Arguments that name the texts of `material` for a teacher elsewhere."""
    return [f"data.train=[{material / 'train.jsonl'}]", f"data.val=[{material / 'val.jsonl'}]"] + [
        f"data.cache_dir={material / 'cache'}"
    ]


def test_unchanged_files_are_hashed_once(finished, tmp_path, monkeypatch):
    run = shutil.copytree(finished, tmp_path / "run")
    read, real = [], digests.file_digest
    monkeypatch.setattr(digests, "file_digest", lambda path: (read.append(path.name), real(path))[1])
    open_run(run)
    assert read == []
    (run / "digests.json").unlink()
    open_run(run)  # and remembers them
    assert "model.safetensors" in read
    del read[:]
    open_run(run)
    assert read == []


# Edited runs


def renamed_checkpoint(run, other):
    folder = run / "stages" / "distill"
    shutil.rmtree(folder / "step-00000003")
    (folder / "step-00000002").rename(folder / "step-00000003")


def later_checkpoint(run, other):
    folder = run / "stages" / "distill"
    (folder / "step-00000002").rename(folder / "step-00000009")


def stage_of_another_run(run, other):
    shutil.rmtree(run / "stages" / "distill")
    shutil.copytree(other / "stages" / "distill", run / "stages" / "distill")


def checkpoint_of_another_run(run, other):
    name = Path("stages") / "distill" / "step-00000003"
    shutil.rmtree(run / name)
    shutil.copytree(other / name, run / name)


def earlier_stage_of_another_run(run, other):
    shutil.rmtree(run / "stages" / "align")
    shutil.copytree(other / "stages" / "align", run / "stages" / "align")


def stage_under_another_name(run, other):
    (run / "stages" / "distill").rename(run / "stages" / "long")
    claims(run, "calibrate", "align", "long")


def flipped_bit(run, other):
    flip(run / "stages" / "distill" / FROZEN)


def edited_record(run, other):
    file = run / "stages" / "distill" / "stage.json"
    file.write_text(file.read_text().replace("step-00000003", "step-00000002"))


def unfinished_but_claimed(run, other):
    shutil.rmtree(run / "stages" / "distill" / "step-00000003")
    (run / "stages" / "distill" / "stage.json").unlink()


def edited_configuration(run, other):
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("preset: cxa079", "preset: rad"))


def edited_identity(run, other):
    file = run / "run.json"
    file.write_text(file.read_text().replace('"weights": "', '"weights": "0'))


def claims_a_path(run, other):
    claims(run, "../../align")


EDITS = {
    renamed_checkpoint: "is not the one that stage distill ended with",
    later_checkpoint: "ended with step-00000003, but",
    stage_of_another_run: "is of another run",
    checkpoint_of_another_run: "is not the one that stage distill ended with",
    earlier_stage_of_another_run: "is of another run",
    stage_under_another_name: "is stage distill, renamed",
    flipped_bit: "frozen.safetensors is damaged",
    edited_record: "stage.json was changed after it was written",
    unfinished_but_claimed: "stage distill does not count as finished",
    edited_configuration: "config.yaml is not the configuration that stage distill was trained with",
    edited_identity: "run.json was changed after it was written",
    claims_a_path: "conversion.json is damaged: its finished_stages are ['../../align']",
}


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_an_edited_run_is_not_exported(run, other, tmp_path, capsys, edit):
    edit(run, other)
    before = content(run)
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 2
    refused(capsys, EDITS[edit])
    assert content(run) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "edit, cause",
    [
        (flipped_bit, "frozen.safetensors is damaged"),
        (stage_of_another_run, "is of another run"),
        (earlier_stage_of_another_run, "is of another run"),
        (edited_identity, "run.json was changed"),
        (lambda run, other: claims(run, *STAGES[:1], "distill"), "stage distill does not count as finished"),
    ],
)
def test_an_edited_run_does_not_go_on(material, run, other, capsys, edit, cause):
    unfinish(interrupted(run))
    edit(run, other)
    before = content(run)
    assert train(material, run, "--resume") == 2
    refused(capsys, cause)
    assert content(run) == before


def unfinish(run):
    """Let the record of distill say what it said before its end."""
    records = RunDirectory(run).records
    record = records.stage("distill")
    files = {FROZEN: record.files[FROZEN]}
    records.write(replace(record, checkpoint=None, files=files))


@pytest.mark.parametrize("name", ["step-00000002", "step-00000001"])
def test_a_renamed_checkpoint_does_not_go_on(material, run, capsys, name):
    interrupted(run)
    folder = run / "stages" / "distill"
    shutil.copytree(folder / "step-00000001", folder / "step-00000002")
    if name == "step-00000001":
        shutil.rmtree(folder / "step-00000001")
    assert train(material, run, "--resume") == 2
    refused(capsys, "step-00000002 was moved: it is of step 1, not 2")


def test_what_came_after_a_stage_keeps_it_from_being_done_again(material, run, capsys):
    """conversion.json forgets align, after which the distillation has begun."""
    claims(run, "calibrate")
    before = content(run)
    assert train(material, run, "--resume") == 2
    refused(capsys, "stage align of", "is to run, but stage distill has begun after it")
    shutil.rmtree(run / "stages" / "align")
    assert train(material, run, "--resume") == 2
    refused(capsys, "stage align does not count as finished")
    assert content(run) == {name: bytes for name, bytes in before.items() if not name.startswith("stages/align/")}


def test_a_stage_done_again_has_nothing_after_it(run):
    """A record of align that is whole, but not the one that distill began after."""
    records = RunDirectory(run).records
    records.write(replace(records.finished("align"), settings="other"))
    with pytest.raises(UserError, match="stage distill .* began after another stage align than the one that is there"):
        open_run(run)


def test_a_run_without_identity_is_read_and_not_continued(material, run, capsys, caplog):
    """As an earlier version has left it."""
    (run / "run.json").unlink()
    for record in run.glob("stages/*/stage.json"):
        record.unlink()
    assert main(["eval", str(run), "--data", str(material / "val.jsonl")]) == 0
    said = [record.getMessage() for record in caplog.records if "no identity" in record.getMessage()]
    assert said == [
        f"run {run} has no identity: it was made by an older version, so neither its teacher nor its stages are checked"
    ]
    before = content(run)
    capsys.readouterr()
    for more in (["--resume"], ["--stage", "long", "stages.long.train=[mixer]"]):
        assert train(material, run, *more) == 2
        refused(capsys, "has no identity (run.json): it was made by an older version")
    assert content(run) == before


# Two processes


def test_one_process_at_a_time(material, run, capsys):
    interrupted(run)
    before = content(run)
    with locked(run):
        assert train(material, run, "--resume") == 2
        refused(capsys, f"{run} is in use by process {os.getpid()} on {socket.gethostname()}")
    assert content(run) == before
    (run / LOCK).write_text("process 1 on a host that died\n")  # what a killed process leaves holds nobody up
    assert train(material, run, "--resume") == 0
    assert not (run / LOCK).exists()


# Other settings


def test_other_settings_are_listed_and_need_a_word(material, run, capsys):
    interrupted(run)
    first = (run / "config.yaml").read_text()
    before = content(run)
    more = ["stages.distill.optim.lr=0.004", "log_every=3"]
    assert train(material, run, "--resume", *more) == 2
    err = capsys.readouterr().err
    assert "stages.distill.optim.lr was " in err and ", is 0.004" in err and "log_every was 10, is 3" in err
    assert "--allow-changes" in err and len(err.splitlines()) == 2
    assert content(run) == before
    unused = ["stages.long.tokens=2M", "stages.sft.optim.lr=1e-5"]  # of stages that do not run
    assert train(material, run, "--resume", *more, *unused) == 2
    assert capsys.readouterr().err == err
    assert train(material, run, "--resume", "--allow-changes", "seed=1") == 2
    refused(capsys, "was made with seed=0, not 1")
    assert content(run) == before  # accepted, and then refused by the checkpoint: nothing was written
    assert train(material, run, "--resume", "--allow-changes", *more, *unused) == 0
    out = capsys.readouterr().out
    assert "changed   log_every was 10, is 3" in out and "changed   stages.distill.optim.lr" in out
    assert not any(f"changed   stages.{name}." in out for name in ("long", "sft"))
    assert f"distill goes on after step 1 of 3, from {run}/stages/distill/step-00000001" in out
    assert (run / "config.1.yaml").read_text() == first
    assert yaml.safe_load((run / "config.yaml").read_text())["log_every"] == 3
    assert open_run(run).config["log_every"] == 3


def test_a_finished_run_says_that_nothing_is_left(material, run, capsys):
    before = content(run)
    assert train(material, run, "--resume") == 0
    assert f"nothing is left to do in {run}" in capsys.readouterr().out
    assert train(material, run, "--resume-from", "step-00000001") == 2
    refused(capsys, f"all stages of {run} are finished")
    assert train(material, run, "--resume", "log_every=3") == 2
    refused(capsys, "log_every was 10, is 3")
    assert content(run) == before


def test_a_stage_that_joins_brings_its_own_settings_only(material, run, capsys):
    assert train(material, run, "--stage", "long", "stages.long.train=[mixer]", "stages.distill.tokens=512") == 2
    refused(capsys, "stages.distill.tokens was 384, is 512")
    small = [f"stages.long.{field}" for field in ("tokens=256", "data.seq_len=32", "batch.tokens=128", "train=[mixer]")]
    assert train(material, run, "--stage", "long", *small) == 0
    capsys.readouterr()
    assert open_run(run).stage == "long"
    assert open_run(run).config["stages"]["long"]["tokens"] == 256
    # each stage with the settings that it ran with
    assert RunDirectory(run).config_of("distill")["stages"]["long"]["tokens"] != 256


# Names


@pytest.mark.parametrize("name", ["../../X", "/tmp/X", ".hidden", "a/b", "a b", "x" * 101])
def test_a_stage_name_is_no_path(material, tmp_path, capsys, name):
    stage = {"objective": "align", "tokens": 384, "train": ["mixer"], "data": {"seq_len": 32}, "batch": {"tokens": 128}}
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump({"run": [name], "stages": {name: stage}}))
    assert train(material, tmp_path / "run", "-c", file) == 2
    refused(capsys, f"stage {name!r} cannot be the name of a directory")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.yaml"]


def test_an_index_names_files_beside_it(material, tmp_path, capsys):
    teacher = shutil.copytree(material / "teacher", tmp_path / "teacher")
    outside = tmp_path / "outside.safetensors"
    (teacher / "model.safetensors").rename(outside)
    names = load_file(outside)
    for path in ("../outside.safetensors", str(outside)):
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, path)}
        (teacher / "model.safetensors.index.json").write_text(json.dumps(index))
        assert train(tmp_path, tmp_path / "run", *material_data(material)) == 2
        refused(capsys, f"model.safetensors.index.json names the file {path!r}")
        assert main(["eval", str(teacher), "--teacher", str(teacher), "--data", str(material / "val.jsonl")]) == 2
        assert f"model.safetensors.index.json names the file {path!r}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_record_with_a_path_is_refused(run):
    with pytest.raises(UserError, match="no stage"):
        RunDirectory(run).stage("../calibrate")


def test_an_export_is_verified_against_its_own_run(run, other, tmp_path, capsys):
    exported = tmp_path / "exported"
    exported.mkdir()
    (exported / "config.json").write_text('{"dtype": "float32"}')
    report = {"run": open_run(run).id, "files": manifest.digests(exported)}
    (exported / "conversion.json").write_text(sealed_text(report))
    assert main(["verify", str(exported), "--against", str(other)]) == 2
    refused(capsys, f"was exported from run {open_run(run).id}, {other} is run {open_run(other).id}")
    report["adapters"] = {"directories": ["../adapter"]}
    (exported / "conversion.json").write_text(sealed_text(report))
    assert main(["verify", str(exported), "--against", str(run)]) == 2
    refused(capsys, "names the adapter directory '../adapter'")
