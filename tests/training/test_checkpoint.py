import errno
import json
import shutil
import subprocess

import pytest
import torch

from rwkvinside.errors import UserError
from rwkvinside.training import checkpoint as module
from rwkvinside.training.checkpoint import Checkpointer, CorruptCheckpoint

TENSORS = {"a.w": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
OPTIMIZER = {"a.w/exp_avg": torch.zeros(2, 3), "step": torch.tensor(3)}


@pytest.fixture
def two(tmp_path):
    """A stage with intact checkpoints at steps 10 and 20."""
    checkpointer = Checkpointer(tmp_path / "stage", {"preset": "cxa079", "layers": (0, 1)})
    for step in (10, 20):
        checkpointer.save(step, TENSORS, OPTIMIZER, {"step": step})
    return checkpointer


def test_what_was_saved_is_loaded(two):
    loaded = two.load()
    assert (loaded.step, loaded.state) == (20, {"step": 20})
    for name, tensor in TENSORS.items():
        assert loaded.tensors()[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors()[name], tensor)
    assert int(loaded.optimizer()["step"]) == 3
    assert two.load("step-00000010").step == 10


def test_a_stage_without_optimizer(tmp_path):
    checkpointer = Checkpointer(tmp_path, {})
    checkpointer.save(0, TENSORS, None, {})
    assert checkpointer.load().optimizer() is None


def test_only_the_newest_are_kept(tmp_path):
    checkpointer = Checkpointer(tmp_path, {}, keep=2)
    for step in (1, 2, 3, 12):
        checkpointer.save(step, TENSORS, None, {})
    assert checkpointer.names() == ["step-00000003", "step-00000012"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


def change_step(path):
    path.write_text(path.read_text().replace('"step": 20', '"step": 21'))


@pytest.mark.parametrize(
    "file, damage, said",
    [
        ("model.safetensors", truncate, "bytes"),
        ("optimizer.safetensors", truncate, "bytes"),
        ("model.safetensors", flip, "SHA-256"),
        ("optimizer.safetensors", lambda path: path.unlink(), "missing"),
        ("state.json", lambda path: path.write_text(path.read_text()[:40]), "cannot be read"),
        ("state.json", lambda path: path.write_bytes(b"\xff\xfe"), "cannot be read"),
        ("state.json", lambda path: path.write_text("[]"), "cannot be read"),
        ("state.json", lambda path: path.unlink(), "cannot be read"),
        ("state.json", change_step, "changed"),
    ],
)
def test_damage_is_refused_and_the_previous_one_offered(two, file, damage, said):
    damage(two.directory / "step-00000020" / file)
    with pytest.raises(CorruptCheckpoint) as caught:
        two.load()
    assert "step-00000020" in caught.value.cause and said in caught.value.cause
    assert "--resume-from step-00000010" in caught.value.hint
    assert two.load("step-00000010").step == 10


def test_no_offer_where_none_is_intact(two):
    for name in two.names():
        truncate(two.directory / name / "model.safetensors")
    with pytest.raises(CorruptCheckpoint) as caught:
        two.load()
    assert "no other intact" in caught.value.hint and "--resume-from" not in caught.value.hint


def test_another_student_is_refused(two):
    other = Checkpointer(two.directory, {"preset": "rad", "layers": [0, 1]})
    with pytest.raises(UserError, match="preset is 'cxa079' there and 'rad' here"):
        other.load()


def test_nothing_there_and_wrong_name(tmp_path, two):
    with pytest.raises(UserError, match="no checkpoint in"):
        Checkpointer(tmp_path / "empty", {}).load()
    with pytest.raises(UserError, match="step-00000010, step-00000020"):
        two.load("step-00000015")


def test_a_full_disk_stops_or_goes_on_as_told(two, monkeypatch, caplog):
    monkeypatch.setattr(module, "free_bytes", lambda directory: 1000)
    with pytest.raises(UserError, match="1000 bytes free"):
        two.save(30, TENSORS, OPTIMIZER, {})
    told = Checkpointer(two.directory, two.fingerprint, on_disk_full="continue")
    assert told.save(30, TENSORS, OPTIMIZER, {}) is None
    assert "cannot write checkpoint" in caplog.text
    with pytest.raises(UserError):  # the last one of a stage: never a silent loss
        told.save(30, TENSORS, OPTIMIZER, {}, required=True)
    assert told.names() == ["step-00000010", "step-00000020"]
    assert told.load().step == 20


def test_a_disk_that_fills_while_writing_leaves_nothing(two, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(UserError, match="No space left"):
        two.save(30, TENSORS, OPTIMIZER, {})
    assert sorted(p.name for p in two.directory.iterdir()) == ["step-00000010", "step-00000020"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("large", ["model", "optimizer", "state"])
def test_a_small_disk_that_fills_in_the_middle(small_disk, monkeypatch, large):
    """The estimate is fooled, as by another program that writes at the same time."""
    checkpointer = Checkpointer(small_disk / "stage", {})
    with pytest.raises(UserError, match="iB free"):
        checkpointer.save(10, TENSORS, OPTIMIZER, {})
    monkeypatch.setattr(module, "free_bytes", lambda directory: 10**12)
    checkpointer.save(10, TENSORS, OPTIMIZER, {"step": 10})
    much = {"a.w": torch.zeros(2**19)}  # 2 MiB
    content = {"model": TENSORS, "optimizer": OPTIMIZER, "state": {}} | {large: much}
    content["state"] = {"filler": "x" * 2**21} if large == "state" else {}
    with pytest.raises(UserError) as caught:
        checkpointer.save(20, content["model"], content["optimizer"], content["state"])
    assert "cannot write checkpoint" in caught.value.cause and "\n" not in caught.value.cause
    assert "free space" in caught.value.hint
    assert [path.name for path in (small_disk / "stage").iterdir()] == ["step-00000010"]
    assert checkpointer.load().state == {"step": 10}
    checkpointer.save(20, TENSORS, OPTIMIZER, {"step": 20})  # with space again
    assert checkpointer.load().step == 20


def test_what_a_killed_writer_left_is_ignored_and_removed(two):
    left = two.directory / ".step-00000030.unfinished"
    shutil.copytree(two.directory / "step-00000020", left)
    assert two.load().step == 20
    two.save(40, TENSORS, OPTIMIZER, {})
    assert not left.exists()


def test_resuming_an_earlier_one_sets_later_ones_aside(two):
    two.save(15, TENSORS, OPTIMIZER, {"branch": 2})
    assert two.names() == ["step-00000010", "step-00000015"]
    assert (two.directory / "abandoned-step-00000020").is_dir()
    assert two.load().state == {"branch": 2}


def test_the_same_step_again_replaces_it(two):
    two.save(20, TENSORS, OPTIMIZER, {"again": True})
    assert two.load().state == {"again": True}
    assert not list(two.directory.glob("abandoned-*"))


def test_no_pickle_anywhere(two):
    """Everything in a checkpoint is JSON or safetensors: a header length, then JSON."""
    for path in (two.directory / "step-00000020").iterdir():
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            length = int.from_bytes(content[:8], "little")
            content = content[8 : 8 + length]
        json.loads(content)


def test_a_checkpoint_knows_its_place(tmp_path):
    checkpointer = Checkpointer(tmp_path / "align", {}, run="one")
    checkpointer.save(10, TENSORS, OPTIMIZER, {})
    assert checkpointer.load().step == 10
    shutil.copytree(tmp_path / "align", tmp_path / "distill")
    (tmp_path / "distill" / "step-00000010").rename(tmp_path / "distill" / "step-00000020")
    shutil.copytree(tmp_path / "align" / "step-00000010", tmp_path / "align" / "step-00000030")
    for folder, run, said in (
        ("align", "two", "step-00000030 was moved: it is of step 10, not 30"),
        ("distill", "one", "step-00000020 was moved: it is of stage align, not distill"),
    ):
        with pytest.raises(CorruptCheckpoint, match=said):
            Checkpointer(tmp_path / folder, {}, run=run).load()
    with pytest.raises(CorruptCheckpoint, match="step-00000010 was moved: it is of run one, not two"):
        Checkpointer(tmp_path / "align", {}, run="two").load("step-00000010")
    with pytest.raises(CorruptCheckpoint, match="step-00000030") as caught:
        checkpointer.load()
    assert "use --resume-from step-00000010" in caught.value.hint


def test_a_checkpoint_of_an_earlier_version_is_read_where_its_run_has_no_id(tmp_path):
    checkpointer = Checkpointer(tmp_path / "align", {})
    path = checkpointer.save(10, TENSORS, None, {})
    content = json.loads((path / module.STATE).read_text())
    del content["place"], content["seal"]
    module._write_state(path / module.STATE, {name: content[name] for name in content if name != "format"})
    assert checkpointer.load().step == 10
    with pytest.raises(CorruptCheckpoint, match="does not say of which run it is"):
        Checkpointer(tmp_path / "align", {}, run="one").load()


def test_a_file_that_was_not_written_with_it_is_refused(two, tmp_path):
    checkpointer = Checkpointer(tmp_path / "fitted", {})
    path = checkpointer.save(1, TENSORS, None, {})
    shutil.copyfile(two.directory / "step-00000020" / module.OPTIMIZER, path / module.OPTIMIZER)
    with pytest.raises(CorruptCheckpoint, match="optimizer.safetensors was not written with it"):
        checkpointer.load()
