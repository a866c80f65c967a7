"""`rwkvinside doctor`: packages and kernels of this machine."""

import tomllib
from pathlib import Path

from rwkvinside import kernels
from rwkvinside.cli import doctor
from rwkvinside.cli import main as cli


def test_doctor_says_what_is_installed(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "ok  transformers" in out and "all requirements are met" in out


def test_doctor_says_which_kernel_runs(capsys, monkeypatch):
    for reason, said in (
        (None, "the native kernel with"),
        ("no C++ compiler", "chunked PyTorch, several times slower than the native kernel: no C++ compiler"),
    ):
        monkeypatch.setattr(kernels, "why_unavailable", lambda backend, reason=reason: reason)
        monkeypatch.setattr(kernels, "instructions", lambda: "avx2")
        assert cli.main(["doctor"]) == 0
        assert f"WKV-7 on the CPU: {said}" in capsys.readouterr().out


def test_what_is_missing_can_be_installed_as_printed(capsys, monkeypatch):
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "0.1" if name == "transformers" else real(name))
    assert cli.main(["doctor"]) == 2
    last = capsys.readouterr().out.splitlines()[-1]
    assert "1 requirements are not met: pip install 'transformers" in last and last.endswith("'")


def test_every_extra_for_users_is_shown(capsys):
    cli.main(["doctor"])
    shown = capsys.readouterr().out
    wanted = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for extra in wanted.keys() - {"dev", "docs"}:
        assert f"(extra {extra})" in shown
