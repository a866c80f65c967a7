import os
import socket
import subprocess
import sys

import pytest

from rwkvinside.errors import UserError
from rwkvinside.support import lock
from rwkvinside.support.lock import LOCK, entries, locked

HOLD = """
import sys, time
from pathlib import Path
from rwkvinside.support.lock import locked

with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_what_nothing_was_put_into_is_gone_again(tmp_path):
    folder = tmp_path / "runs" / "a"
    with locked(folder):
        assert (folder / LOCK).read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
        assert entries(folder) == []
    assert list(tmp_path.iterdir()) == []
    with locked(folder):
        (folder / "kept").touch()
    assert [path.name for path in folder.iterdir()] == ["kept"]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(KeyboardInterrupt), locked(empty):
        raise KeyboardInterrupt
    assert empty.is_dir() and not list(empty.iterdir())  # it was there before


def test_another_process_is_named_and_a_killed_one_holds_nothing(tmp_path):
    folder = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError) as caught, locked(folder):
            pass
        assert caught.value.cause == f"{folder} is in use by process {process.pid} on {socket.gethostname()}"
        assert folder.is_dir() and caught.value.exit_code == 2
    finally:
        process.kill()
        process.wait()
    assert (folder / LOCK).exists()
    with locked(folder):
        assert f"process {os.getpid()} " in (folder / LOCK).read_text()


def test_a_lock_on_a_file_that_lost_its_name_is_none(tmp_path, monkeypatch):
    """The holder before removes its file between our opening and our locking of it."""
    folder, real, removed = tmp_path / "run", lock._lock, []

    def late(descriptor, directory):
        if not removed:
            removed.append(True)
            (directory / LOCK).unlink()
            directory.rmdir()
        real(descriptor, directory)

    monkeypatch.setattr(lock, "_lock", late)
    with locked(folder):
        assert removed and (folder / LOCK).exists()
        with pytest.raises(UserError, match="is in use by process"), locked(folder):
            pass


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to .*file"), locked(tmp_path / "file"):
        pass
