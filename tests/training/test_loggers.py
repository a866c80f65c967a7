"""TensorBoard really, read back from its event files; wandb and trackio as packages that note what they are told."""

import importlib
import json
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_training import local_engine, trainer

from rwkvinside.errors import UserError
from rwkvinside.training.checkpoint import Checkpointer
from rwkvinside.training.loggers import Loggers, check_loggers, run_identity, scalars
from rwkvinside.training.metrics import MetricsWriter

TRAIN = {"kind": "train", "stage": "align", "step": 3, "tokens": 96, "loss": 0.5, "lr": None, "time": 1e9}


def test_the_numbers_of_a_row():
    row = TRAIN | {"layers": {"0": 0.25, "7": None}, "note": "x"}
    assert scalars(row) == {"tokens": 96, "loss": 0.5, "layers/0": 0.25}
    assert scalars(row | {"kind": "eval"}) == {"eval/tokens": 96, "eval/loss": 0.5, "eval/layers/0": 0.25}


def events(run, stage):
    accumulator = EventAccumulator(str(run / "tensorboard" / stage))
    accumulator.Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def test_tensorboard_holds_what_metrics_jsonl_holds(tmp_path):
    """Two stages, the second one killed after step 5 and resumed from step 4: no step twice, none missing."""
    checkpointer = Checkpointer(tmp_path / "stages", {})

    def stage(name, **options):
        loggers = Loggers(["tensorboard"], tmp_path, {})
        loggers.open()
        toy = trainer(local_engine(), stage=name, metrics=MetricsWriter(tmp_path, loggers), **options)
        if checkpointer.names():
            toy.restore(checkpointer.load())
        try:
            toy.fit()
        finally:
            loggers.close()

    def evaluate(step):
        if step == 5 and not crashed:
            crashed.append(step)
            raise KeyboardInterrupt
        return {"kl": 1 / step}

    crashed = []
    options = {"checkpointer": checkpointer, "save_every": 2, "evaluate": evaluate, "evaluate_every": 1}
    stage("align")
    with pytest.raises(KeyboardInterrupt):
        stage("distill", **options)
    stage("distill", **options)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for name in ("align", "distill"):
        wanted = {}
        for row in rows:
            if row["stage"] == name:
                for tag, value in scalars(row).items():
                    wanted.setdefault(tag, []).append((row["step"], pytest.approx(value, rel=1e-6)))
        assert events(tmp_path, name) == wanted
    assert [step for step, _ in events(tmp_path, "distill")["loss"]] == list(range(1, 9))
    assert "layers/1" in events(tmp_path, "align") and "eval/kl" in events(tmp_path, "distill")


FAKE = """
class Error(Exception):
    pass

class Run:
    def __init__(self, **options):
        calls.append(("init", options))
    def define_metric(self, name, step_metric):
        calls.append(("define_metric", name, step_metric))
    def log(self, values):
        calls.append(("log", values))
    def finish(self):
        calls.append(("finish",))

calls, problem = [], None

def init(**options):
    if problem:
        raise Error(problem)
    return Run(**options)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Installs a package of this name, and returns it."""

    def install(name):
        (tmp_path / "packages" / name).mkdir(parents=True)
        (tmp_path / "packages" / name / "__init__.py").write_text(FAKE)
        monkeypatch.syspath_prepend(tmp_path / "packages")
        monkeypatch.delitem(sys.modules, name, raising=False)
        module = importlib.import_module(name)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return install


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_go_on_with_the_same_run(fake, tmp_path, name, monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    package, run = fake(name), tmp_path / "my-run"
    run.mkdir()
    for step in (None, 1):  # started, then resumed after step 1
        loggers = Loggers([name], run, {"seed": 3})
        writer = MetricsWriter(run, loggers)
        loggers.open()
        writer.begin("align", step)
        writer.write(TRAIN | {"layers": {"0": 0.25, "1": torch.nan}})
        loggers.close()
    first, second = (call[1] for call in package.calls if call[0] == "init")
    assert first == second and first["resume"] == "allow" and first["config"] == {"seed": 3}
    assert first["project"] == "rwkvinside" and "my-run" in first["name"]
    assert run_identity(run) in (first["id"] if name == "wandb" else first["name"])
    sent = [call[1] for call in package.calls if call[0] == "log"]
    wanted = {"align/loss": 0.5, "align/tokens": 96, "align/layers/0": 0.25, "align/step": 3}
    assert sent == [wanted, wanted]
    assert [call[0] for call in package.calls].count("finish") == 2
    if name == "wandb":
        assert ("define_metric", "align/*", "align/step") in package.calls and first["dir"] == str(run)


def test_other_runs_have_other_identities(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert run_identity(tmp_path / "a") == run_identity(tmp_path / "a") != run_identity(tmp_path / "b")
    (tmp_path / "a" / "loggers.json").write_text("{")
    with pytest.raises(UserError, match="loggers.json is damaged"):
        run_identity(tmp_path / "a")


def test_wandb_that_does_not_start_is_one_line(fake, tmp_path):
    fake("wandb").problem = "No API key\nconfigured."
    with pytest.raises(UserError) as caught:
        Loggers(["wandb"], tmp_path, {}).open()
    assert "wandb does not start: No API key configured." in caught.value.cause
    assert "WANDB_MODE=offline" in caught.value.hint


def test_a_missing_package_is_refused(tmp_path, monkeypatch):
    check_loggers(["tensorboard"])
    (tmp_path / "wandb").mkdir()  # what wandb leaves in a folder is not the package
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError) as caught:
        check_loggers(["wandb"])
    assert "wandb is not installed" in caught.value.cause and caught.value.hint.startswith("pip install wandb,")
