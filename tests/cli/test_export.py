"""`rwkvinside export` and `verify`, and the script that is both."""

import sys
from types import SimpleNamespace

import pytest

import convert_checkpoint
from rwkvinside.cli import main as cli
from rwkvinside.export.registry import FORMATS


@pytest.fixture
def given(monkeypatch):
    """What a format that only notes its arguments was given: a module and a line in the table."""
    calls = []

    def write(*arguments, **options):
        calls.append((arguments, options))
        return {"stage": "distill", "checkpoint": "step-2", "parameters": 7, "dtype": "float32"}

    monkeypatch.setitem(sys.modules, "rwkvinside.export.notes", SimpleNamespace(write=write))
    monkeypatch.setitem(FORMATS, "notes", ("notes:write", "writes nothing"))
    return calls


def test_export_of_something_else_is_refused(tmp_path, capsys):
    for main in (cli.main, convert_checkpoint.main):
        assert main(["export", str(tmp_path), "--to", "hf", "--out", str(tmp_path / "x")]) == 2
        assert "is not a run directory" in capsys.readouterr().err
        file = tmp_path / "conversion.json"
        file.touch()
        assert main(["export", str(file), "--to", "hf", "--out", str(tmp_path / "x")]) == 2
        assert f"{file} is a file, not a run directory" in capsys.readouterr().err
        file.unlink()
        assert not (tmp_path / "x").exists()


def test_only_the_options_that_are_given_reach_the_format(given, capsys):
    assert cli.main(["export", "--to", "notes", "RUN", "--out", "DIR"]) == 0
    assert capsys.readouterr().out == "wrote DIR: stage distill, step-2, 7 parameters, float32\n"
    assert cli.main(["export", "RUN", "--to=notes", "--out=DIR", "--untie-embeddings", "--merge", "--dtype=fp16"]) == 0
    assert given == [
        (("RUN", "DIR"), {}),
        (("RUN", "DIR"), {"tie_embeddings": False, "adapters": "merge", "dtype": "float16"}),
    ]


def test_formats_are_named_in_the_help_and_in_the_refusal(given, capsys):
    with pytest.raises(SystemExit):
        cli.main(["export", "--help"])
    assert "notes: writes" in capsys.readouterr().out
    assert cli.main(["export", "RUN", "--to", "note", "--out", "DIR"]) == 2
    assert (
        capsys.readouterr().err
        == "error: export format 'note' is not known; did you mean notes?\nformats: hf, gguf, notes\n"
    )


def test_verify_of_something_else_is_refused(tmp_path, capsys):
    for main in (cli.main, convert_checkpoint.main):
        assert main(["verify", str(tmp_path), "--against", str(tmp_path)]) == 2
        assert "is not an exported model" in capsys.readouterr().err
