import hashlib
import os

import pytest

from rwkvinside.support import digests
from rwkvinside.support.digests import FileDigests


@pytest.fixture
def read(monkeypatch):
    """The names of the files that are really read, in order."""
    names, real = [], digests.file_digest
    monkeypatch.setattr(digests, "file_digest", lambda path: (names.append(path.name), real(path))[1])
    return names


def sha(content):
    return hashlib.sha256(content).hexdigest()


def test_a_file_is_read_once_until_it_changes(tmp_path, read):
    file, memory = tmp_path / "weights", tmp_path / "digests.json"
    file.write_bytes(b"one")
    known = FileDigests(memory)
    assert known.of(file) == sha(b"one") == known.of(file) and read == ["weights"]
    known.save()
    assert FileDigests(memory).of(file) == sha(b"one") and read == ["weights"]

    file.write_bytes(b"three")  # another size
    assert FileDigests(memory).of(file) == sha(b"three")
    file.write_bytes(b"two")  # the size of the first
    os.utime(file, ns=(0, 1))
    assert FileDigests(memory).of(file) == sha(b"two")
    assert len(read) == 3


def test_another_file_of_the_same_size_and_time_is_read(tmp_path, read):
    file, memory = tmp_path / "weights", tmp_path / "digests.json"
    file.write_bytes(b"one")
    known = FileDigests(memory)
    known.of(file)
    known.save()
    stat = file.stat()
    (tmp_path / "new").write_bytes(b"two")
    os.utime(tmp_path / "new", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(tmp_path / "new", file)
    assert FileDigests(memory).of(file) == sha(b"two") and len(read) == 2


def test_a_link_is_what_it_points_to(tmp_path, read):
    (tmp_path / "blob").write_bytes(b"one")
    (tmp_path / "link").symlink_to(tmp_path / "blob")
    known = FileDigests()
    assert known.of_all([tmp_path / "link"]) == [sha(b"one")] == [known.of(tmp_path / "blob")]
    assert read == ["blob"]


def test_a_damaged_or_edited_memory_is_an_empty_one(tmp_path, read):
    file, memory = tmp_path / "weights", tmp_path / "digests.json"
    file.write_bytes(b"one")
    known = FileDigests(memory)
    known.of(file)
    known.save()
    edited = memory.read_text().replace(sha(b"one"), sha(b"two"))
    for text in ("{", "[]", '{"x": 1}', edited):
        memory.write_text(text)
        assert FileDigests(memory).of(file) == sha(b"one")
    assert len(read) == 5


def test_what_another_process_has_saved_meanwhile_is_used(tmp_path, read):
    file, memory = tmp_path / "weights", tmp_path / "digests.json"
    file.write_bytes(b"one")
    first, second = FileDigests(memory), FileDigests(memory)
    first.of(file)
    first.save()
    assert second.of(file) == sha(b"one") and len(read) == 1
