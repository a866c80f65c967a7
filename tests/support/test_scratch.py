"""Directories of living processes stay, those of dead ones go."""

import os
import signal
import subprocess
import sys

import pytest

from rwkvinside.support.scratch import scratch


def test_it_is_there_and_then_gone(tmp_path):
    with scratch(tmp_path / "deep" / "out") as first, scratch(tmp_path / "deep" / "out") as second:
        assert first != second and first.is_dir() and second.is_dir()
        (first / "file").touch()
    assert list((tmp_path / "deep").iterdir()) == []
    with pytest.raises(KeyboardInterrupt), scratch(tmp_path / "out") as folder:
        raise KeyboardInterrupt
    assert not folder.exists()


def test_what_a_killed_process_left_is_removed(tmp_path):
    code = (
        "import os, sys, time; from pathlib import Path; from rwkvinside.support.scratch import scratch\n"
        "with scratch(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_text('x'); print(folder, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "o[u]t"], stdout=subprocess.PIPE, text=True)
    left = process.stdout.readline().strip()
    with scratch(tmp_path / "o[u]t"):
        assert os.path.exists(f"{left}/half"), "its process lives"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (tmp_path / ".o[u]t.0a1b2c3d.unfinished").write_text("a file, not a directory")
    for other in (".o[u]t.unfinished", ".out.0a1b2c3d.unfinished", ".o[u]t.cache", "o[u]t.0a1b2c3d.unfinished"):
        (tmp_path / other).touch()  # of others
    with scratch(tmp_path / "another"):
        assert os.path.exists(left), "of other work"
    with scratch(tmp_path / "o[u]t"):
        assert not os.path.exists(left) and not (tmp_path / ".o[u]t.0a1b2c3d.unfinished").exists()
    assert len(list(tmp_path.iterdir())) == 4
