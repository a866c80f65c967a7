"""Runs beside each other: what differs, the table in all its forms, curves of all."""

import csv
import json

import pytest
import yaml
from measured_run import Reader, save_run

from rwkvinside.cli.main import main
from rwkvinside.errors import UserError
from rwkvinside.report.compare import compare_runs, latex, write_comparison
from rwkvinside.runs.records import Records


@pytest.fixture
def runs(tmp_path):
    one, other = save_run(tmp_path / "plain", window=0), save_run(tmp_path / "with_window")
    rows = [json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["kind"] == "eval" and row["stage"] == "distill":
            row["kl"] = 0.5
    (one / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return one, other


def test_what_differs_is_named_with_its_values(runs):
    assert compare_runs(runs).differences == [("student.window", ["0", "8"])]
    assert compare_runs(runs).warnings == []


def test_stages_are_compared_where_they_run(runs):
    for path, run, tokens in zip(runs, (["align", "alone"], ["align"]), (1, 2), strict=True):
        config = yaml.safe_load((path / "config.yaml").read_text())
        stages = {name: {"tokens": tokens, "train": ["mixer"]} for name in ("align", "alone", "idle")}
        (path / "config.yaml").write_text(yaml.safe_dump(config | {"run": run, "stages": stages}))
    found = dict(compare_runs(runs).differences)
    assert found.keys() == {"student.window", "run", "stages.align.tokens"}
    assert found["stages.align.tokens"] == ["1", "2"]


def test_runs_that_cannot_be_compared_are_warned_of(runs):
    config = yaml.safe_load((runs[0] / "config.yaml").read_text())
    (runs[0] / "config.yaml").write_text(yaml.safe_dump(config | {"data": {"val": ["other.jsonl"]}}))
    (runs[0] / "conversion.json").write_text(json.dumps({"teacher": "another"}))
    teachers, data = compare_runs(runs).warnings
    assert "different teachers" in teachers and "different data" in data
    for path in runs:  # the same files, now known, lie elsewhere
        Records(path).make_identity({"weights": "0a1b"})
    [data] = compare_runs(runs).warnings
    assert "different data" in data


def test_page_table_and_curves(runs, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["compare", *map(str, runs), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "student.window" in said and f"wrote {out / 'compare.html'}" in said.replace("\n", "")
    page = (out / "compare.html").read_text()
    text = " ".join(Reader(page).text.split())
    assert "plain · with_window" in text and "plain 0.5000 3.2500 97.5 % 8.1 K 0:02:40 95.4 MiB" in text
    assert '<tr class="final"><th scope="row">with_window</th>' in page, "the nearest to its teacher"
    with (out / "compare.csv").open() as file:
        plain, windowed = csv.DictReader(file)
    assert (plain["run"], plain["kl"], plain["student.window"]) == ("plain", "0.5", "0")
    assert (windowed["kl"], windowed["seconds"], windowed["stage"]) == ("0.25", "160.0", "distill")
    curves = (out / "figures" / "compare-validation.csv").read_text().splitlines()
    assert curves[0].startswith("run,of,stage") and curves[1].startswith("plain,") and "with_window," in curves[-1]
    assert {path.suffix for path in (out / "figures").iterdir()} == {".svg", ".pdf", ".csv"}


def test_latex_is_escaped():
    text = latex([["run", "KL"], ["a_b & 100 %", "–"]])
    assert "  a\\_b \\& 100 \\% & -- \\\\\n" in text and "\\begin{tabular}{lr}\n  \\toprule" in text


def test_names_stay_apart(runs, tmp_path):
    (tmp_path / "deep").mkdir()
    twin = save_run(tmp_path / "deep" / "plain")
    assert list(compare_runs([runs[0], twin]).runs) == [str(runs[0]), str(twin)]


def test_what_is_no_comparison_is_refused(runs, tmp_path):
    with pytest.raises(UserError, match="one run alone"):
        compare_runs(runs[:1])
    with pytest.raises(UserError, match="is named twice"):
        compare_runs([runs[0], runs[0]])
    with pytest.raises(UserError, match="nowhere is not a run directory"):
        compare_runs([runs[0], tmp_path / "nowhere"])
    for run in runs:
        (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="none of the runs"):
        write_comparison(compare_runs(runs), tmp_path / "out")
    assert not (tmp_path / "out").exists()
