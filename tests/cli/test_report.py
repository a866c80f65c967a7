"""`rwkvinside report`: the files that it writes and names."""

import json

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


def test_a_run_without_metrics_is_refused(tmp_path, capsys):
    assert main(["report", "--out", str(tmp_path / "plots"), str(tmp_path)]) == 2
    assert "metrics.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "plots").exists()
