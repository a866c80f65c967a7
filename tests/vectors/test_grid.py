import json
from pathlib import Path

import pytest

from rwkvinside.cli.main import main as rwkvinside
from rwkvinside.errors import UserError
from rwkvinside.vectors import grid
from rwkvinside.vectors.baselines import NAMES
from rwkvinside.vectors.grid import read_plan
from rwkvinside.vectors.model import build_model
from rwkvinside.vectors.settings import RunConfig, checked, load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "vectors"
PLAN = """
settings: {steps: 2, batch: 8, evaluate_every: 0, model: {d_model: 32, layers: 1}}
groups:
  - name: first
    entries:
      - {name: gru, settings: {model: {arch: gru}}, vary: {optim.lr: [1e-3, 2e-3, 3e-3]}, count: 2}
      - {name: lstm, settings: {model: {arch: lstm}}}
  - name: second
    entries:
      - {name: best, select: 2, seeds: [5]}
      - {name: vote, ensemble: 2}
"""
OVERRIDES = ["data.limit=64", "data.val=0.05"]


@pytest.fixture(autouse=True)
def _short_baselines(monkeypatch):
    monkeypatch.setattr("rwkvinside.vectors.baselines.MLP_STEPS", 3)


def test_plan_100_is_the_study_s(capsys):
    assert rwkvinside(["vectors", "grid", str(CONFIGS / "plan_100.yaml"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "100 runs: baselines 15, state-space 30, transformers 20, advanced 20, refinement 15"
    assert len(lines) == 101


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_files_make_models(file):
    from torch._subclasses import FakeTensorMode

    runs = [run.settings for run in read_plan(file) if run.kind == "train"] if "groups:" in file.read_text() else None
    configs = [load_config(RunConfig, [file])] if runs is None else [checked(RunConfig, settings) for settings in runs]
    for config in configs:
        with FakeTensorMode():  # sizes without memory
            shallow = config.model.model_copy(update={"layers": min(config.model.layers, 6)})
            assert sum(p.numel() for p in build_model(shallow).parameters())


def test_killed_grid_resumes_without_repeating(tmp_path, monkeypatch, capsys):
    plan, out = tmp_path / "plan.yaml", tmp_path / "runs"
    plan.write_text(PLAN)
    words = ["vectors", "grid", str(plan), "--out", str(out), *OVERRIDES]
    trained, whole = [], grid.train

    def counted(config, say):
        if len(trained) == 2 and not (out / "leaderboard.md").exists():
            raise KeyboardInterrupt
        trained.append(Path(config.out).name) if not (Path(config.out) / "result.json").exists() else None
        return whole(config, say)

    monkeypatch.setattr(grid, "train", counted)
    assert rwkvinside(words) == 130
    assert len(trained) == 2
    (out / "leaderboard.md").touch()  # goes on from here
    assert rwkvinside(words) == 0
    assert len(trained) == len(set(trained)) == 5
    files = [out / f"leaderboard.{kind}" for kind in ("md", "csv", "json")]
    before = [file.read_bytes() for file in files]
    assert rwkvinside(words) == 0 and len(trained) == 5
    assert [file.read_bytes() for file in files] == before
    rows = json.loads(files[2].read_text())
    assert len(rows) == 6 and {row["arch"] for row in rows} == {"gru", "lstm", "ensemble"}
    assert {row["seed"] for row in rows if row["run"].startswith("best")} == {5}
    capsys.readouterr()
    several = tmp_path / "several"
    assert rwkvinside(["vectors", "grid", str(plan), "--out", str(several), "--jobs", "2", *OVERRIDES]) == 0
    assert "[6/6] second: vote" in capsys.readouterr().out
    same = json.loads((several / "leaderboard.json").read_text())
    assert [(row["run"], row["cosine"]) for row in same] == [(row["run"], row["cosine"]) for row in rows]
    page = tmp_path / "page.html"
    assert rwkvinside(["vectors", "leaderboard", str(out), "--html", str(page)]) == 0
    said = capsys.readouterr().out
    assert "FAIL      cosine > 0.85" in said and "no texts  decode accuracy > 50 %" in said
    assert "PASS      latency (p95) < 100 ms" in said or "FAIL      latency (p95) < 100 ms" in said
    assert page.read_text().count("<tr class=") == 6 + len(NAMES) and "http" not in page.read_text()


def test_failed_runs_are_recorded_and_the_others_made(tmp_path, capsys):
    plan, out = tmp_path / "plan.yaml", tmp_path / "runs"
    bad = "{name: bad, settings: {model: {arch: gru, options: {gru: {wings: 2}}}}}"
    plan.write_text(PLAN.split("  - name: second")[0] + f"      - {bad}\n")
    assert rwkvinside(["vectors", "grid", str(plan), "--out", str(out), *OVERRIDES, "--max-runs", "4"]) == 1
    assert "bad FAILED: model.options.gru.wings is not known" in capsys.readouterr().out
    assert "Traceback" in json.loads((out / "bad-failed.json").read_text())["traceback"]
    assert len(json.loads((out / "leaderboard.json").read_text())) == 3


def test_plans_are_checked(tmp_path):
    plan = tmp_path / "plan.yaml"
    for text, message in (
        ("groups: [{name: a, entries: [{name: b, vray: {}}]}]", "did you mean groups.0.entries.0.vary"),
        ("groups: [{name: a, entries: [{name: b}, {name: b}]}]", "two runs are named b"),
        ("groups: [{name: a, entries: [{name: b, vary: {seed: [1]}, count: 2}]}]", "count=2 of 1 combinations"),
    ):
        plan.write_text(text)
        with pytest.raises(UserError, match=message):
            read_plan(plan)


def test_bench_has_a_row_for_every_architecture(tmp_path, capsys):
    words = ["--d-in", "48", "--d-model", "64", "--layers", "2", "--repeats", "2", "--json", str(tmp_path / "b.json")]
    assert rwkvinside(["vectors", "bench", "--archs", "all", *words]) == 0
    rows = {row["arch"]: row for row in json.loads((tmp_path / "b.json").read_text())["rows"]}
    assert len(rows) == 15 and all(row["params"] > 0 and row["p50_ms"] > 0 for row in rows.values())
    assert not rows["linformer"]["causal"] and rows["lcm_two"]["steps"] == 20 and rows["rwkv7"]["state_bytes"]


def test_demo(tmp_path, capsys):
    out = tmp_path / "demo"
    words = ["vectors", "demo", "--out", str(out), "--quick"]
    assert rwkvinside(words) == 0
    page = (out / "leaderboard.html").read_text()
    assert "Decoded examples" in page and "context_mean" in page and "ensemble" in page
