"""`rwkvinside report`: the files that it writes and names."""

import json

import pytest

from rwkvinside.cli.main import main


def test_report_writes_what_the_run_can_answer(tmp_path, capsys):
    rows = [
        {"kind": "train", "stage": "distill", "step": step, "tokens": 20 * step, "loss": 1 / step} for step in (1, 2, 3)
    ]
    scores = {"kl": 0.5, "ce": 3.5, "ce_teacher": 3, "agreement": 0.9}
    rows.append({"kind": "eval", "stage": "distill", "step": 3, "tokens": 60, **scores})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["report", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "report.html", "report.png", "figures"}
    assert capsys.readouterr().out.splitlines() == [
        f"wrote {tmp_path / 'report.html'}",
        f"wrote {tmp_path / 'report.png'}",
        f"wrote 2 figures as SVG and PDF, with CSV, in {tmp_path / 'figures'}",
    ]


def refused(capsys, *arguments):
    """What is said where a command is refused: a cause and a hint."""
    assert main([*map(str, arguments)]) == 2
    cause, hint = capsys.readouterr().err.splitlines()
    return f"{cause} | {hint}"


@pytest.fixture
def run(tmp_path):
    """A run that has measured something, the least that is shown."""
    folder = tmp_path / "run"
    folder.mkdir()
    row = {"kind": "train", "stage": "distill", "step": 1, "tokens": 20, "loss": 1}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    return folder


@pytest.mark.parametrize("command", ["report", "compare"])
def test_what_has_no_metrics_is_named(run, tmp_path, capsys, command):
    before = [run] if command == "compare" else []
    file, begun = tmp_path / "train.jsonl", tmp_path / "begun"
    file.touch()
    begun.mkdir()
    (begun / "config.yaml").touch()
    for given, cause in (
        (tmp_path, f"error: {tmp_path} is not a run directory: metrics.jsonl is missing | give the directory"),
        (tmp_path / "nowhere", "nowhere is not a run directory: metrics.jsonl is missing"),
        (file, f"error: {file} is a file, not a run directory | give the directory of the run"),
        (begun, f"error: run {begun} has measured nothing yet: metrics.jsonl is missing | let it train first"),
    ):
        assert cause in refused(capsys, command, *before, given, "--out", tmp_path / "plots")
        assert not (tmp_path / "plots").exists()


@pytest.mark.parametrize("command", ["report", "compare"])
def test_a_folder_that_cannot_be_is_refused_before_any_run_is_read(tmp_path, capsys, command):
    file = tmp_path / "train.jsonl"
    file.touch()
    for out, cause in (
        (file, f"output {file} is a file | name a folder"),
        (file / "plots", "plots is in a file | name"),
    ):
        assert cause in refused(capsys, command, "nowhere", "--out", out)


def test_what_is_no_evaluation_is_named(run, tmp_path, capsys):
    for file, cause in ((tmp_path / "no.json", "No such file or directory | "), (tmp_path, "Is a directory | ")):
        assert f"{file} is not an evaluation: {cause}`rwkvinside eval" in refused(capsys, "report", run, "--eval", file)
