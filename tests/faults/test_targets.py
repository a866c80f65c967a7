"""Targets that are full or may not be written: refused in a line, nothing half is left, and the next try works."""

import pytest
from command_process import finish, start
from disturbed import arguments, result
from faults import assert_survived, faults

WRITING = ("pack", "logits", "train", "export", "eval")


def largest(folder):
    """Bytes of the longest file below a folder, or of a file."""
    return max(path.stat().st_size for path in (folder, *folder.rglob("*")) if path.is_file())


@faults("full targets", small=2, full=30)
def test_a_full_target(world, tmp_path, rng, number):
    """No file may become longer than a part of the longest that the command writes; its log is shorter than that."""
    name = WRITING[number % len(WRITING)]
    _, expected = world.undisturbed(name)
    out, log = tmp_path / "out", tmp_path / "log"
    room = rng.randrange(16_384, max(16_385, largest(world.root / name) + 1))
    code = finish(start(arguments(world, name, out), log, file_bytes=room))
    assert_survived(code, log.read_text())
    if code != 0 or name == "train":
        more = ["--resume"] if name == "train" and (out / "run.json").exists() else []
        code = finish(start(arguments(world, name, out, *more), log))
    assert code == 0, log.read_text()
    assert result(name, out) == expected


@pytest.mark.faults("read-only targets")
@pytest.mark.parametrize("name", WRITING)
@pytest.mark.parametrize("place", ["folder", "file in the way"])
def test_a_target_that_may_not_be_written(world, tmp_path, name, place):
    if place == "folder":
        target = tmp_path / "locked"
        target.mkdir(mode=0o555)
    else:
        target = tmp_path / "file"
        target.write_text("mine")
    log = tmp_path / "log"
    world.undisturbed("train")
    code = finish(start(arguments(world, name, target / "out"), log, powerless=True))
    assert code == 2, log.read_text()
    assert_survived(code, log.read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["log", target.name])
    assert not target.is_dir() or not list(target.iterdir())
