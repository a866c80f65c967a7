import errno
import hashlib
import json
import os

import pytest

from rwkvinside.errors import UserError
from rwkvinside.support import files
from rwkvinside.support.files import (
    file_digest,
    publish,
    remove_unfinished,
    replacing,
    temporary_sibling,
    write_json,
    write_text,
)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_file_takes_the_place_of_the_old_one_when_it_is_whole(tmp_path):
    path = tmp_path / "below" / "numbers.txt"
    for text in ("old", "new"):
        with replacing(path) as temporary:
            assert temporary.parent == path.parent and temporary.name == ".numbers.txt.unfinished"
            temporary.write_text(text)
            assert not path.exists() or path.read_text() == "old"
        assert path.read_text() == text
    assert names(path.parent) == ["numbers.txt"]


@pytest.mark.parametrize("unique", [False, True])
def test_an_error_leaves_what_was_there(tmp_path, unique):
    path = tmp_path / "numbers.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path, unique=unique) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and names(tmp_path) == ["numbers.txt"]
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "folder", unique=unique) as temporary:
        temporary.mkdir()
        (temporary / "a").write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["numbers.txt"]


def test_every_byte_is_flushed_before_the_rename_and_the_name_after_it(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (done.append(os.fstat(number).st_ino), fsync(number)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), replace(a, b)))
    with replacing(tmp_path / "folder") as temporary:
        (temporary / "inner").mkdir(parents=True)
        for name in ("a", "inner/b"):
            (temporary / name).write_text(name)
    folder = tmp_path / "folder"
    flushed = {path.stat().st_ino for path in (folder, *folder.rglob("*"))}
    at = done.index("rename")
    assert set(done[:at]) == flushed and len(flushed) == 4 and done[at + 1 :] == [tmp_path.stat().st_ino]
    assert done[at - 1] == folder.stat().st_ino  # the directory after what it holds


def test_writers_with_names_of_their_own_do_not_meet(tmp_path):
    path = tmp_path / "entry"
    with temporary_sibling(path, unique=True) as first, temporary_sibling(path, unique=True) as second:
        first.write_text("first")
        second.write_text("second")
        publish(second, path)
        publish(first, path)
    assert path.read_text() == "first" and names(tmp_path) == ["entry"]


def test_a_directory_takes_no_place_that_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(OSError), replacing(tmp_path / "out") as temporary:
        temporary.mkdir()
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_what_a_killed_process_left_is_replaced_or_removed(tmp_path):
    left = tmp_path / ".folder.unfinished"
    left.mkdir()
    (left / "old").touch()
    with replacing(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "new").touch()
    assert names(tmp_path / "folder") == ["new"]
    for name in ("step-1", "step-2.0a1b2c3d", "other"):
        (tmp_path / f".{name}.unfinished").touch()
    (tmp_path / ".step-3.unfinished").mkdir()
    remove_unfinished(tmp_path, "step-*")
    assert names(tmp_path) == [".other.unfinished", "folder"]


def test_json_is_for_people(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1, None], "c": "ü"})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text.endswith("}\n") and text.startswith('{\n  "b"') and json.loads(text) == {"b": [1, None], "c": "ü"}


def test_no_space_is_one_clear_line(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError) as caught:
        write_text(tmp_path / "a.txt", "new", hint="free space, then go on")
    assert caught.value.cause == f"cannot write {tmp_path / 'a.txt'}: No space left on device"
    assert caught.value.hint == "free space, then go on"
    assert (tmp_path / "a.txt").read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_a_folder_that_is_a_file_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*a.json"):
        write_json(tmp_path / "file" / "a.json", {})


def test_the_digest_is_that_of_the_whole_file(tmp_path):
    content = os.urandom(2**22 + 3)  # more than a block
    (tmp_path / "a").write_bytes(content)
    assert file_digest(tmp_path / "a") == hashlib.sha256(content).hexdigest()
