"""Completion scripts: bash runs its own; the others name all commands."""

import shutil
import subprocess

import pytest

from rwkvinside.cli.completion import script
from rwkvinside.cli.main import VERBS, main

TRY = """
source {script}
try() {{ COMP_WORDS=("$@"); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _rwkvinside; echo "${{COMPREPLY[@]}}"; }}
try rwkvinside da
try rwkvinside data ins
try rwkvinside data inspect x --te
try rwkvinside train --teacher foo --resu
try rwkvinside eval some-file
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_commands_and_flags(tmp_path, capsys):
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    done = subprocess.run(
        ["bash", "-c", TRY.format(script=tmp_path / "script")], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["data", "inspect", "--teacher --text-column", "--resume --resume-from", ""]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_scripts_name_all_commands(shell):
    text = script(shell, VERBS)
    assert all(verb in text for verb in VERBS) and "resume-from" in text


def test_an_unknown_shell_is_refused(capsys):
    assert main(["completion", "tcsh"]) == 2
    assert "tcsh" in capsys.readouterr().err
