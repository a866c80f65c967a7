"""Hostfiles, the hosts in them, and the start on several machines; `ssh` is a script that lets some hosts in."""

import os
import sys

import pytest

import train_distill
from rwkvinside.cli import main as cli
from rwkvinside.errors import UserError
from rwkvinside.training.launch import check_hosts, launch, read_hostfile


@pytest.fixture
def ssh(tmp_path, monkeypatch):
    """Lets hosts called good... in; says what ssh says of the others."""
    script = tmp_path / "bin" / "ssh"
    script.parent.mkdir()
    script.write_text(
        '#!/bin/sh\nshift 5\ncase "$1 $2" in "good"*" true") exit 0;; esac\n'
        'echo "ssh: connect to host $1 port 22: No route to host" >&2\nexit 255\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")


def test_a_hostfile_is_read(tmp_path):
    file = tmp_path / "hosts"
    file.write_text("# ours\nworker-1 slots=8\n\nworker-2   slots=4  # the old one\n")
    assert read_hostfile(file) == {"worker-1": 8, "worker-2": 4}


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "names no host"),
        ("worker-1 slots=0\n", "line 1: 'worker-1 slots=0'"),
        ("a slots=1\nb\n", "line 2: 'b'"),
        (f"a slots={'9' * 5000}\n", "line 1: 'a slots=9999"),
        ("a slots=1\na slots=2\n", "line 2: a is listed twice"),
        ("a slots=1\n-oProxyCommand=id slots=1\n", "line 2: '-oProxyCommand=id' is not the name or the address"),
        ("a,-oProxyCommand=id slots=1\n", "is not the name or the address"),
        ("root@a slots=1\n", "line 1: 'root@a' is not the name"),
        ("$(id) slots=1\n", "is not the name"),
        ("fe80::1%-o slots=1\n", "is not the name"),
    ],
)
def test_other_files_are_refused(tmp_path, text, said):
    file = tmp_path / "hosts"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        read_hostfile(file)
    assert str(file) in caught.value.cause and said in caught.value.cause
    with pytest.raises(UserError, match="cannot be read"):
        read_hostfile(tmp_path / "nothing")


def test_addresses_are_hosts(tmp_path):
    file = tmp_path / "hosts"
    file.write_text("10.0.0.7 slots=1\nfe80::1%eth0 slots=1\n2001:db8::1 slots=1\nnode_3.cluster-a slots=1\n")
    assert list(read_hostfile(file)) == ["10.0.0.7", "fe80::1%eth0", "2001:db8::1", "node_3.cluster-a"]


def test_a_host_is_never_an_option_of_ssh(tmp_path, monkeypatch):
    script = tmp_path / "ssh"
    script.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    check_hosts({"-oProxyCommand=id": 1, "b": 1})  # past the hostfile's own check
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 2 and all(" -- " in call.split(" true")[0] for call in calls)
    assert any(call.endswith("-- -oProxyCommand=id true") for call in calls)


def test_hosts_that_do_not_answer_are_named(ssh):
    check_hosts({"good-1": 8, "good-2": 8})
    check_hosts({"far": 8})  # alone: the launcher needs no ssh
    with pytest.raises(UserError) as caught:
        check_hosts({"good-1": 8, "far": 8, "farther": 8})
    assert caught.value.cause.startswith("2 of 3 hosts cannot be reached: far, farther (far: ssh: connect")
    assert "No route to host" in caught.value.cause and "\n" not in caught.value.cause


def test_real_ssh_says_why(tmp_path):
    with pytest.raises(UserError, match="nowhere.invalid"):
        check_hosts({"nowhere.invalid": 1, "nowhere-else.invalid": 1})


@pytest.mark.parametrize(
    "main, started_again",
    [
        (train_distill.main, [train_distill.__file__]),
        (lambda arguments: cli.main(["train", *arguments]), ["--module", "rwkvinside", "train"]),
    ],
)
def test_the_command_checks_then_becomes_the_launcher(main, started_again, tmp_path, ssh, monkeypatch, capsys):
    file, started = tmp_path / "hosts", []
    monkeypatch.setattr(os, "execv", lambda path, command: started.append(command) or sys.exit(0))
    arguments = ["--hostfile", str(file), "--teacher", "Qwen3-0.6B", "--data", str(tmp_path), "run=[align]"]
    file.write_text("good-1 slots=8\nfar slots=8\n")
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 2 and "far" in error[0] and "hostfile" in error[1] and not started
    file.write_text("good-1 slots=8\ngood-2 slots=8\n")
    with pytest.raises(SystemExit):
        main(arguments)
    (command,) = started
    assert command[1:5] == ["-m", "deepspeed.launcher.runner", "--hostfile", str(file)]
    assert command[5:] == [*started_again, *arguments]


def test_a_plan_for_the_hosts_starts_nothing(tmp_path, monkeypatch, capsys):
    file = tmp_path / "hosts"
    file.write_text("far slots=8\nfarther slots=8\n")
    monkeypatch.setattr(os, "execv", None)
    arguments = ["--hostfile", str(file), "--teacher", "Qwen3-0.6B", "--dry-run", "--stage", "align"]
    assert train_distill.main(arguments) == 0
    assert "16 ranks" in capsys.readouterr().out


def test_arguments_reach_the_launcher_unchanged(monkeypatch):
    seen = []
    monkeypatch.setattr(os, "execv", lambda path, command: seen.append((path, command)))
    launch("hosts", ["train_distill.py", "a b", "c=[d]"])
    assert seen == [
        (
            sys.executable,
            [
                sys.executable,
                "-m",
                "deepspeed.launcher.runner",
                "--hostfile",
                "hosts",
                "train_distill.py",
                "a b",
                "c=[d]",
            ],
        )
    ]
