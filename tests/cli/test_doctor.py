"""`rwkvinside doctor`: packages and kernels of this machine."""

from rwkvinside import kernels
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
