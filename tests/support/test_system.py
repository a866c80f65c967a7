"""Systems that are not here: what Windows lacks is taken away, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rwkvinside
from rwkvinside.cli.main import main as rwkvinside_command
from rwkvinside.errors import UserError
from rwkvinside.support.system import lock_file, signals

# What CPython for Windows does not have, of what this package might use. Other packages are imported before it goes.
WITHOUT = """
import os, signal, sys
for name in ("fcntl", "grp", "pty", "pwd", "readline", "resource", "termios", "tty"):
    sys.modules[name] = None
for name in ("fork", "geteuid", "getpgid", "getuid", "killpg", "mkfifo", "sched_getaffinity", "setpgrp", "uname"):
    delattr(os, name)
for name in ("SIGALRM", "SIGHUP", "SIGKILL", "SIGPROF", "SIGUSR1", "setitimer", "ITIMER_PROF", "alarm"):
    if name in signal.Signals.__members__:
        signal.Signals._member_map_.pop(name)
    delattr(signal, name)
"""


def without(code, *arguments, **options):
    """Run code in a Python that lacks it all."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.mark.integration
def test_every_module_can_be_imported_on_windows():
    folders = [Path(folder) for folder in rwkvinside.__path__]
    names = sorted(
        ".".join(("rwkvinside", *file.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__")
        for folder in folders
        for file in folder.rglob("*.py")
        if file.name != "__main__.py"
    )
    kernels = Path(rwkvinside.__path__[0]).parent / "kernels" / "wkv7" / "native"
    names += [f"rwkvinside.kernels.native.{file.stem}" for file in kernels.glob("[a-z]*.py")]
    names.remove("rwkvinside.modeling.mlx.hybrid_mlx")  # for mlx-lm, which Windows has not; nothing here imports it
    assert len(names) > 200
    others = "datasets, matplotlib.pyplot, peft, psutil, rich.live, torch, transformers, triton"
    code = f"import {others}\n{WITHOUT}\nimport importlib, json\n" + (
        "failed = {}\n"
        "for name in json.load(sys.stdin):\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except Exception as error:\n"
        "        failed[name] = repr(error)\n"
        "print(json.dumps(failed))"
    )
    done = without(code, input=json.dumps(names))
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {}


def test_a_directory_is_locked_by_what_windows_has(tmp_path):
    """With a stand-in of msvcrt: the byte is locked where nobody reads, and a second holder is named."""
    code = f"{WITHOUT}" + (
        "from types import ModuleType\n"
        "import errno\n"
        "held, msvcrt = set(), ModuleType('msvcrt')\n"
        "def locking(descriptor, mode, count):\n"
        "    at = (os.fstat(descriptor).st_ino, os.lseek(descriptor, 0, os.SEEK_CUR))\n"
        "    if at in held: raise PermissionError(errno.EACCES, 'locked')\n"
        "    held.add(at)\n"
        "msvcrt.locking, msvcrt.LK_NBLCK = locking, 2\n"
        "sys.modules['msvcrt'] = msvcrt\n"
        "from pathlib import Path\n"
        "from rwkvinside.support.lock import locked\n"
        "from rwkvinside.errors import UserError\n"
        "with locked(Path(sys.argv[1]) / 'run'):\n"
        "    try:\n"
        "        with locked(Path(sys.argv[1]) / 'run'): print('twice')\n"
        "    except UserError as error: print(error.cause)\n"
        "print([at for _, at in held])\n"
    )
    done = without(code, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    refused, where = done.stdout.splitlines()
    assert refused.startswith(f"{tmp_path / 'run'} is in use by process ") and where == f"[{2**30}]"


def test_a_template_without_end_is_ended_by_the_clock():
    script = Path(rwkvinside.__path__[0]) / "data" / "render_template.py"
    code = f"import transformers.utils.chat_template_utils\n{WITHOUT}\nimport runpy\n" + (
        "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    )
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    questions = [
        {"messages": [{"role": "user", "content": "hello"}], "options": {"chat_template": template}}
        for template in ("{{ messages[0].content }}", loops)
    ]
    done = without(code, script, "1.0", "1000000000", input="".join(json.dumps(q) + "\n" for q in questions))
    assert done.stdout.splitlines() == ['{"text": "hello", "spans": []}'] and done.returncode == 124, done.stderr[-900:]


def test_locks_of_files_and_names_of_signals(tmp_path):
    with open(tmp_path / "lock", "w") as first, open(tmp_path / "lock", "w") as second:
        lock_file(first.fileno(), wait=False)
        with pytest.raises(BlockingIOError):
            lock_file(second.fileno(), wait=False)
        first.close()
        lock_file(second.fileno(), wait=True)
    assert [number.name for number in signals("SIGTERM", "SIGNOWHERE")] == ["SIGTERM"]
    assert os.name != "nt" or not signals("SIGHUP")


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "--teacher", "Qwen3-0.6B", "device=mps"],
        ["eval", "DIR", "--device", "mps"],
        ["chat", "DIR", "--device", "mps"],
        ["vectors", "bench", "--device", "mps"],
    ],
    ids=" ".join,
)
def test_gpus_of_apple_are_refused_in_one_line(words, capsys):
    assert rwkvinside_command(words) == 2
    first, *others = capsys.readouterr().err.splitlines()
    assert first.endswith("no support for Apple's GPUs, as the recurrence has no kernel for them; use cpu")
    assert len(others) <= 1 and "mps" in first
    with pytest.raises(UserError, match="device mps: no support"):
        rwkvinside.evaluate("DIR", "TEACHER", data=["val.jsonl"], device="mps")
