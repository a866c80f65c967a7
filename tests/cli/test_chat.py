"""`rwkvinside chat` and `rwkvinside generate` as processes: a terminal of 80 columns, a pipe, Ctrl-C and Ctrl-D."""

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from tiny import byte_tokenizer, save_qwen3

from rwkvinside.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model that never ends by itself; any directory that transformers loads can be talked to."""
    path = tmp_path_factory.mktemp("model")
    save_qwen3(path, byte_tokenizer("<|end|>", bos_token="<|end|>"))
    return path


class Terminal:
    """A process on a terminal of 80 columns."""

    def __init__(self, *command):
        self.pid, self._file = pty.fork()
        if not self.pid:
            os.chdir(ROOT)
            os.execv(sys.executable, [sys.executable, "-m", "rwkvinside", *command])
        fcntl.ioctl(self._file, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.text = self._unseen = ""

    def wait_for(self, text, seconds=120):
        """Read until a text comes after the one that was found last."""
        end = time.monotonic() + seconds
        while text not in self._unseen:
            assert time.monotonic() < end, f"{text!r} does not come after {self.text!r}"
            if select.select([self._file], [], [], 0.2)[0]:
                new = os.read(self._file, 4096).decode(errors="replace")
                self.text, self._unseen = self.text + new, self._unseen + new
        self._unseen = self._unseen.partition(text)[2]

    def type(self, text):
        os.write(self._file, text.encode())

    def end_by(self, key, seconds=60):
        """Type a key until the process has ended, and return its exit code.

        A key that comes before the line can be edited is not what it is to the editor.
        """
        for _ in range(seconds):
            self.type(key)
            time.sleep(1)
            while select.select([self._file], [], [], 0)[0]:
                try:
                    os.read(self._file, 4096)
                except OSError:  # nobody is at the other end
                    break
            if (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
                return os.waitstatus_to_exitcode(ended[1])
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError(f"{key!r} does not end {self.text!r}")


def test_a_talk_on_a_terminal(model):
    terminal = Terminal("chat", str(model), "--max-tokens", "1M", "--teacher", str(model))
    terminal.wait_for("> ")
    assert "Ctrl-C ends a reply, Ctrl-D the talk" in terminal.text
    terminal.type("hello\n")
    terminal.wait_for("student")
    time.sleep(0.5)
    terminal.type("\x03")  # ends the reply, not the talk
    terminal.wait_for("tokens/s")
    terminal.wait_for("> ")
    time.sleep(0.5)  # until the line can be edited
    terminal.type("\x03")
    terminal.wait_for("Ctrl-D ends the talk")
    assert terminal.end_by("\x04") == 0


def test_piped_lines(model):
    command = [sys.executable, "-m", "rwkvinside", "chat", str(model), "--max-tokens", "5", "--temperature", "0"]
    done = subprocess.run(command, input="hello\n more\n", capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "no chat template" in done.stderr and done.stderr.count("5 new, ") == 2
    assert done.stdout and "tokens/s" not in done.stdout  # the replies, and nothing else


def test_generate_writes_text_and_json(model, tmp_path, capsys):
    (tmp_path / "prompts").write_text("hello\n\nonce upon a time\n")
    more = ["--max-tokens", "4", "--temperature", "0", "--json", str(tmp_path / "out.json")]
    assert main(["generate", str(model), "--prompts", str(tmp_path / "prompts"), *more]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())
    assert [each["prompt"] for each in found["texts"]] == ["hello", "once upon a time"]
    assert all(each["tokens"] == 4 and each["prompt"] + each["text"][:1] in out for each in found["texts"])
    assert found["sampling"]["temperature"] == 0 and found["plain"] and found["tokens"] == 8


@pytest.mark.parametrize(
    "more, cause",
    [
        (["--prompts", "nowhere"], "prompts nowhere cannot be read"),
        (["--prompt", "x", "--top-p", "2"], "top_p 2"),
        (["--prompt", "x", "--prompts", "y"], "not allowed with argument"),
        ([], "one of the arguments --prompt --prompts is required"),
    ],
)
def test_what_cannot_be_generated(model, more, cause, capsys):
    assert main(["generate", str(model), *more]) == 2
    assert cause in capsys.readouterr().err
