"""The command as users meet it: help at once, a line of cause and one of hint for what is wrong, exit codes."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import convert_checkpoint
import rwkvinside
import train_distill
from rwkvinside.cli import main as cli
from rwkvinside.errors import Interrupted, UserError, VerificationError

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "numpy", "pydantic", "deepspeed"}

HELP = """
import argparse, contextlib, importlib, io, json, os, sys
from rwkvinside.cli.arguments import ArgumentParser
from rwkvinside.cli.main import VERBS, main

os.environ["COLUMNS"] = "80"
imported, wide, unstated, parse = {}, [], [], ArgumentParser.parse

def looked_at(parser, argv):
    for action in parser._actions:
        usual = action.default in (None, False, [], (), "", argparse.SUPPRESS) or action.help == argparse.SUPPRESS
        if not usual and "default" not in action.help:
            unstated.append(f"{parser.prog} {action.dest}: {action.help}")
    return parse(parser, argv)

ArgumentParser.parse = looked_at
def help(*command):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main([*command, "--help"])
    assert out.getvalue().startswith("usage: rwkvinside"), command
    imported[" ".join(command)] = sorted(set(sys.modules) & set(sys.argv[1:]))
    wide.extend(line for line in out.getvalue().splitlines() if len(line) > 79)

help()
for verb in VERBS:
    help(verb)
    module = VERBS[verb][0].partition(":")[0]
    for command in getattr(importlib.import_module(f"rwkvinside.cli.{module}"), "COMMANDS", ()):
        help(verb, command)
print(json.dumps({"imported": imported, "wide": wide, "unstated": unstated}))
"""


def run(*command, **options):
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, **options)


def test_help_of_every_verb_imports_nothing_heavy_fits_80_columns_and_states_defaults():
    result = run("-c", HELP, *HEAVY)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["wide"] == found["unstated"] == []
    imported = found["imported"]
    assert {"train", "data pack", "bench wkv7", "config fields", "verify"} < imported.keys()
    assert not {command: found for command, found in imported.items() if found}


@pytest.mark.parametrize("script", ["train_distill.py", "convert_checkpoint.py"])
def test_help_of_the_scripts_imports_nothing_heavy(script):
    result = run("-X", "importtime", script, "--help")
    assert result.returncode == 0
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in result.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & HEAVY


def test_the_module_is_the_command():
    result = run("-m", "rwkvinside", "--version")
    assert (result.returncode, result.stdout) == (0, f"rwkvinside {rwkvinside.__version__}\n")
    assert "commands:\n  train " in run("-m", "rwkvinside", "--help").stdout


@pytest.mark.parametrize(
    "main, argv, cause",
    [
        (cli.main, ["trian"], "rwkvinside has no command 'trian'; did you mean train?"),
        (cli.main, [], "rwkvinside needs a command"),
        (cli.main, ["data", "inspct"], "rwkvinside data has no command 'inspct'; did you mean inspect?"),
        (cli.main, ["bench"], "rwkvinside bench needs a command"),
        (cli.main, ["data", "inspect", "x", "--tokenz", "y"], "unknown flag --tokenz; did you mean --tokenizer?"),
        (cli.main, ["plan", "--tokenz=y"], "unknown flag --tokenz"),  # a flag of another verb
        (cli.main, ["plan", "--local_rank=0"], "unknown flag --local_rank"),
        (cli.main, ["--local_rank=0", "plan"], "unknown flag --local_rank"),
        (cli.main, ["plan", "--teacher", "x", "--ranks", "0"], "argument --ranks: '0' is not a whole number of at"),
        (cli.main, ["doctor", "now"], "unrecognized arguments: now"),
        (convert_checkpoint.main, ["exprt"], "convert_checkpoint.py has no command 'exprt'; did you mean export?"),
        (convert_checkpoint.main, ["export", "x"], "the following arguments are required: --out"),
        (train_distill.main, ["--resum"], "ambiguous option: --resum could match --resume, --resume-from"),
        (train_distill.main, ["--stag", "align"], "no teacher is given"),  # flags may be shortened, as argparse does
        (train_distill.main, ["--resume", "--out", "no/run"], "no/run is not a run directory: config.yaml is missing"),
        (train_distill.main, ["--resumed"], "unknown flag --resumed; did you mean --resume?"),
    ],
)
def test_what_is_not_known_ends_in_a_line_of_cause_and_one_of_hint(main, argv, cause, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) == 2 and lines[0].startswith("error: ")
    assert lines[1].startswith(("see ", "commands: ", "use --teacher", "give the directory"))
    assert cause in lines[0]


def test_no_traceback_from_a_process():
    result = run("-m", "rwkvinside", "train", "--teacher", "Qwen3-14C")
    assert result.returncode == 2
    assert result.stderr.startswith("error: teacher 'Qwen3-14C'") and "Traceback" not in result.stderr


@pytest.mark.parametrize("error, code", [(UserError, 2), (VerificationError, 3), (Interrupted, 75)])
def test_exit_codes(capsys, error, code):
    @cli.report_errors
    def main(argv=None):
        raise error("cause", "hint")

    assert main() == code
    assert capsys.readouterr().err == "error: cause\nhint\n"


def test_what_an_error_quotes_stays_within_its_line(capsys):
    @cli.report_errors
    def command(argv):
        raise UserError("2 problems:", "correct\n  them", ["a\nb: unknown", "\x1b[31m\u202e: unknown, naïve ✓"])

    assert command([]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: 2 problems:",
        "  a b: unknown",
        r"  \x1b[31m\u202e: unknown, naïve ✓",
        "correct them",
    ]


def test_what_the_system_refuses_is_a_line(capsys):
    def failing(error):
        @cli.report_errors
        def main(argv=None):
            raise error

        return main

    assert failing(OSError(errno.ESTALE, "Stale file handle", "/shared/run\n/x"))() == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[0] == "error: /shared/run /x: Stale file handle" and len(lines) == 2
    with pytest.raises(OSError, match="a fault of the program"):
        failing(OSError(errno.EINVAL, "a fault of the program"))()
    assert cli.main(["config", "show", "--teacher", "x" * 5000]) == 2
    assert cli.main(["plan", "--ranks", "9" * 5000]) == 2
    assert "is not a whole number of at least 1" in capsys.readouterr().err


def test_a_directory_that_was_removed(tmp_path, monkeypatch, capsys):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert cli.main(["config", "fields"]) == 2
    assert capsys.readouterr().err.splitlines()[0] == "error: the current directory does not exist any more"


def test_ctrl_c_is_a_line(capsys):
    @cli.report_errors
    def main(argv=None):
        raise KeyboardInterrupt

    assert main() == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.integration
def test_a_closed_pipe_is_silent():
    for arguments in (["config", "fields"], ["plan", "--teacher", "Qwen3-0.6B"]):
        command = [sys.executable, "-m", "rwkvinside", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
        process.stdout.close()
        said = process.stderr.read().decode()
        assert process.wait() == 141 and "Error" not in said and "Traceback" not in said, said


@pytest.mark.integration
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_output_that_cannot_be_written_is_a_line():
    for arguments, stream in (("config fields", ">"), ("doctor", ">"), ("plan --teacher Qwen3-0.6B", ">"), ("", "2>")):
        command = f"{sys.executable} -m rwkvinside {arguments} {stream} /dev/full"
        done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
        said = ["error: nothing more can be printed: No space left on device"] if stream == ">" else []
        assert done.returncode == 2 and done.stderr.splitlines()[:1] == said, done.stderr
    latin = os.environ | {"PYTHONIOENCODING": "latin1"}
    command = [sys.executable, "-c", "from rwkvinside.errors import report_errors as r; r(lambda _: print('ü█'))()"]
    assert subprocess.run(command, capture_output=True, cwd=ROOT, env=latin).stdout == b"\xfc?\n"
    closed = subprocess.run(f"{sys.executable} -m rwkvinside config fields >&- 2>&-", shell=True, cwd=ROOT)
    assert closed.returncode == 0


@pytest.mark.integration
@pytest.mark.parametrize("argument, code", [("--resume", 75), ("", 130)])
def test_an_end_during_an_import_is_told_by_the_exit_code(tmp_path, argument, code):
    """CPython itself notes an interrupt that goes through `exec`, and would end with SIGINT."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED)
    command = [sys.executable, "-m", "rwkvinside", "train", *filter(None, [argument])]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith("error: stopped before the run went on" if argument else "interrupted\n")


# SIGTERM comes when the configuration is about to be imported, out of a text that is executed.
INTERRUPTED = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "rwkvinside.config.load":
            exec("os.kill(os.getpid(), signal.SIGTERM); [None for _ in range(1000)]")

sys.meta_path.insert(0, Finder())
"""


@pytest.mark.integration
def test_kernels_do_not_hide_the_package_of_that_name():
    code = "import kernels, rwkvinside.kernels as k, rwkvinside.recipes; print(kernels.__file__, k.__name__)"
    assert run("-c", code).stdout.split() == ["None", "rwkvinside.kernels"]
