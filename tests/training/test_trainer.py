import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_hybrid as tiny
import torch
from toy_training import (
    LENGTH,
    ROWS_PER_STEP,
    SCHEDULE,
    STEPS,
    Losses,
    PoisonStep,
    Source,
    local_engine,
    trainer,
)

from rwkvinside.errors import Interrupted, UserError
from rwkvinside.training import checkpoint as checkpoint_module
from rwkvinside.training.callbacks import Callback
from rwkvinside.training.checkpoint import Checkpointer, rng_state, set_rng_state
from rwkvinside.training.local_engine import LocalEngine
from rwkvinside.training.metrics import MetricsWriter
from rwkvinside.training.process_group import Distributed
from rwkvinside.training.schedule import StageLength
from rwkvinside.training.stop_signal import sigterm_interrupts

HELPERS = Path(__file__).resolve().parents[1] / "helpers"
MEASURED = ("time", "tokens_per_s", "memory_mb")  # differ from run to run


def worker(*args):
    environment = os.environ | {"PYTHONPATH": f"{HELPERS}{os.pathsep}{HELPERS.parents[1]}"}
    command = [sys.executable, str(HELPERS / "resume_worker.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def metrics(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


def last(run):
    return Checkpointer(run / "stages" / "toy", {"preset": "toy"}).load()


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) for k in a)


class Stop(Exception):
    """A crash between the update and the checkpoint."""


def test_resumed_is_bit_identical(tmp_path):
    """In one process; the kill from outside is below."""

    def run(directory, crash_at=None, resume=False):
        def evaluate(step):
            if step == crash_at:
                raise Stop
            return {"draw": float(torch.rand(()))}

        checkpointer, writer = Checkpointer(directory, {}), MetricsWriter(directory)
        options = {"evaluate": evaluate, "evaluate_every": 1, "save_every": 2}
        toy = trainer(local_engine(), checkpointer=checkpointer, metrics=writer, **options)
        if resume:
            toy.restore(checkpointer.load())
        toy.fit()
        return checkpointer.load()

    straight = run(tmp_path / "a")
    with pytest.raises(Stop):
        run(tmp_path / "b", crash_at=5)
    torch.manual_seed(99)
    resumed = run(tmp_path / "b", resume=True)
    assert same(straight.tensors(), resumed.tensors()) and same(straight.optimizer(), resumed.optimizer())
    assert straight.state["rng"]["torch"] == resumed.state["rng"]["torch"]
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert straight.state["finished"] and straight.state["rows"] == STEPS * ROWS_PER_STEP


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    run = tmp_path_factory.mktemp("straight")
    done = worker(run)
    assert done.returncode == 0, done.stderr
    return run


@pytest.mark.integration
@pytest.mark.parametrize("die_at", [4, 5])  # 5: one step after a checkpoint is lost and done again
def test_killed_and_resumed_is_bit_identical(straight, tmp_path, die_at):
    """Dropout and evaluations that draw random numbers included."""
    killed = worker(tmp_path, "--die-at", die_at)
    assert killed.returncode == -signal.SIGKILL
    assert last(tmp_path).step == (die_at - 1) // 2 * 2
    resumed = worker(tmp_path, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    a, b = last(straight), last(tmp_path)
    assert a.step == b.step == STEPS
    assert same(a.tensors(), b.tensors()) and same(a.optimizer(), b.optimizer())
    assert a.state == b.state and a.state["finished"] and a.state["rows"] == STEPS * ROWS_PER_STEP
    assert metrics(straight) == metrics(tmp_path)


@pytest.mark.integration
def test_sigterm_saves_and_exits_75(straight, tmp_path):
    stopped = worker(tmp_path, "--term-at", 3)
    assert stopped.returncode == 75
    assert "stopped at step 3 of 8" in stopped.stderr and "--resume" in stopped.stderr
    assert last(tmp_path).step == 3
    assert worker(tmp_path, "--resume").returncode == 0
    assert same(last(straight).tensors(), last(tmp_path).tensors())
    assert metrics(straight) == metrics(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_the_last_step_is_not_lost(tmp_path, number):
    def evaluate(step):
        signal.raise_signal(number)
        return {}

    checkpointer = Checkpointer(tmp_path, {})
    before = signal.signal(number, signal.SIG_DFL)  # nohup, under which tests may run, has others ignore it
    try:
        with pytest.raises(Interrupted) as caught:
            trainer(local_engine(), checkpointer=checkpointer, evaluate=evaluate).fit()
        assert caught.value.exit_code == 75
        assert checkpointer.load().state["finished"]
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_under_nohup_a_closed_terminal_is_ignored(tmp_path):
    def evaluate(step):
        signal.raise_signal(signal.SIGHUP)
        return {}

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with sigterm_interrupts():
            trainer(local_engine(), evaluate=evaluate).fit()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("where", ["step", "evaluation"])
def test_what_cannot_be_printed_ends_the_run_once_it_is_saved(tmp_path, where):
    class Printing(Callback):
        def step(self, trainer, row):
            if where == "step" and row["step"] == 3:
                raise BrokenPipeError

        def evaluation(self, trainer, row):
            if row["step"] == 3:
                raise OSError(errno.ENOSPC, "full")

    checkpointer = Checkpointer(tmp_path, {})
    options = dict(metrics=MetricsWriter(tmp_path), evaluate=lambda step: {"kl": 0.5}, evaluate_every=3)
    toy = trainer(local_engine(), checkpointer=checkpointer, **options)
    toy.callbacks.insert(0, Printing())
    with pytest.raises(OSError, match="full" if where == "evaluation" else None):
        toy.fit()
    assert checkpointer.load().step == 3
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3, 3]  # who is told after it is told all the same


def test_metrics_rows(tmp_path):
    trainer(local_engine(), metrics=MetricsWriter(tmp_path), evaluate=lambda step: {"kl": 0.5}, evaluate_every=3).fit()
    rows = metrics(tmp_path)
    train = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in train] == list(range(1, STEPS + 1))
    read = Source().batch(range(3 * ROWS_PER_STEP)).num_tokens
    assert train[2]["tokens"] == read < 3 * LENGTH.tokens_per_step  # padding does not count
    assert train[2]["lr"] == SCHEDULE.rates(3, LENGTH)["mixer"]
    assert train[2]["lr_rest"] == SCHEDULE.rates(3, LENGTH)["rest"]
    assert train[2]["loss"] == pytest.approx(sum(train[2]["layers"].values()))
    assert set(train[2]["layers"]) == {"0", "1"} and train[2]["ce"] == train[2]["layers"]["1"]
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [3, 6, STEPS]
    raw = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(name in raw[0] for name in MEASURED)


@pytest.mark.parametrize("steps, evaluated", [(41, [20, 41]), (42, [20, 42]), (43, [20, 40, 43])])
def test_no_evaluation_just_before_the_last(steps, evaluated):
    told, length = [], replace(LENGTH, total_tokens=steps * LENGTH.tokens_per_step)
    options = {"evaluate": lambda step: told.append(step) or {"kl": 0.5}, "evaluate_every": 20}
    trainer(local_engine(), length=length, **options).fit()
    assert told == evaluated


def test_the_toy_learns():
    losses = Losses()
    trainer(local_engine(0.0), metrics=losses).fit()
    assert losses["loss"][-1] < 0.8 * losses["loss"][0]


@pytest.mark.parametrize("micro_rows", [1, 3, 4])
def test_cutting_a_step_into_micro_batches_changes_nothing(micro_rows):
    """The sums are the same but for their order: fp32 rounding, 1e-6 relative."""

    def run(n):
        losses, engine = Losses(), local_engine(dropout=0.0)
        trainer(engine, micro_rows=n, metrics=losses).fit()
        return losses, engine.full_parameters()

    (whole, weights), (cut, cut_weights) = run(ROWS_PER_STEP), run(micro_rows)
    assert cut["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert cut["grad_norm"] == pytest.approx(whole["grad_norm"], rel=2e-6)
    for name in weights:
        torch.testing.assert_close(cut_weights[name], weights[name], rtol=0, atol=1e-6)


def test_nan_stops_and_names_rows_and_layers(tmp_path):
    checkpointer, engine = Checkpointer(tmp_path, {}), local_engine()
    bad = 4 * ROWS_PER_STEP + 5  # in update 5, second micro-batch
    options = {"checkpointer": checkpointer, "save_every": 2, "labels": {"layers": [3, 7]}}
    with pytest.raises(UserError) as caught:
        trainer(engine, step=PoisonStep(bad), **options).fit()
    cause, hint = caught.value.cause, caught.value.hint
    assert "stage toy, step 5: loss nan" in cause and "layers 7 nan" in cause and "layers 3" not in cause
    assert "rows 36, 37, 38, 39;" in cause
    assert "step-00000004" in hint and checkpointer.load().step == 4
    assert same(engine.full_parameters(), checkpointer.load().tensors())  # the bad update was not made


def test_infinite_gradient_stops(tmp_path):
    checkpointer = Checkpointer(tmp_path, {})
    with pytest.raises(UserError, match="step 1: gradient norm|step 1: loss .*gradient norm (nan|inf)"):
        trainer(local_engine(), step=PoisonStep(0, "gradient"), checkpointer=checkpointer).fit()
    assert checkpointer.names() == []


def test_full_disk_goes_on_only_if_told(tmp_path, monkeypatch):
    free = iter([0, 10**12, 10**12, 10**12])
    monkeypatch.setattr(checkpoint_module, "free_bytes", lambda directory: next(free))
    told = Checkpointer(tmp_path / "told", {}, on_disk_full="continue")
    trainer(local_engine(), checkpointer=told, save_every=2).fit()
    assert told.names() == ["step-00000006", "step-00000008"]
    monkeypatch.setattr(checkpoint_module, "free_bytes", lambda directory: 0)
    with pytest.raises(UserError, match="cannot write checkpoint"):
        trainer(local_engine(), checkpointer=Checkpointer(tmp_path / "stop", {}), save_every=2).fit()
    told = Checkpointer(tmp_path / "end", {}, on_disk_full="continue")
    with pytest.raises(UserError, match="cannot write checkpoint"):  # the end of a stage is never given up
        trainer(local_engine(), checkpointer=told, save_every=2).fit()


@pytest.fixture
def saved(tmp_path):
    checkpointer = Checkpointer(tmp_path, {})
    trainer(local_engine(), checkpointer=checkpointer, settings={"seed": 1}).fit()
    return checkpointer.load()


def test_a_checkpoint_of_other_settings_is_refused(saved):
    for options, said, advised in (
        ({"settings": {"seed": 2}}, "seed=1, not 2", "with the settings that it was made with"),
        ({"settings": {"seed": 1}, "stage": "other"}, "stage='toy'", "with the settings that it was made with"),
        (
            {"settings": {"seed": 1}, "length": StageLength(1000, 24, 6)},
            "batch_tokens=48, not 24",
            "resume with stages.toy.batch.tokens=48 that it was made with",
        ),
        ({"settings": {"seed": 1}, "length": StageLength(96, 48, 6)}, "is at step 8, the stage has 2", "raise"),
    ):
        with pytest.raises(UserError) as caught:
            trainer(local_engine(), **options).restore(saved)
        assert said in caught.value.cause and advised in caught.value.hint


def test_a_checkpoint_of_other_parameters_is_refused(saved):
    engine = local_engine()
    engine.trainable = {n: p for n, p in engine.trainable.items() if n != "scale"}
    with pytest.raises(UserError, match="scale/exp_avg is not trained here"):
        trainer(engine, settings={"seed": 1}).restore(saved)


def test_extra_tensors_are_saved_with_those_that_train(tmp_path):
    checkpointer, engine = Checkpointer(tmp_path, {}), local_engine()
    frozen = {"frozen.weight": engine.module.frozen.weight, "scale": torch.zeros(8)}
    trainer(engine, checkpointer=checkpointer, extra=frozen).fit()
    saved = checkpointer.load().tensors()
    assert torch.equal(saved["frozen.weight"], engine.module.frozen.weight)
    assert torch.equal(saved["scale"], engine.module.scale)  # what trains comes from the engine
    resumed = trainer(local_engine())
    resumed.restore(checkpointer.load())
    resumed.fit()  # a finished stage: nothing left to do
    assert same(resumed.engine.full_parameters(), engine.full_parameters())


def test_random_states_survive_json():
    state = json.loads(json.dumps(rng_state()))
    import random

    import numpy as np

    def draw():
        return random.gauss(0, 1), np.random.normal(size=3).tolist(), torch.randn(3).tolist()

    first = draw()
    draw()
    set_rng_state(state)
    assert draw() == first


@pytest.mark.parametrize("poisoned", ["model.layers.1.mlp", "lm_head_loss"])
def test_nan_in_a_real_student_names_the_module_and_the_rows(poisoned):
    student, make_step = tiny.distill()
    engine = LocalEngine(student, tiny.groups(student), tiny.SETTINGS, Distributed("cpu"))
    module = student.lm_head_loss if poisoned == "lm_head_loss" else student.lm.get_submodule(poisoned)
    bad = tiny.Source().batch([9]).input_ids  # in update 2

    def poison(module, args, output):
        if len(seen.rows) == 1 and torch.equal(ids[-1][:1], bad):
            return (output[0] * torch.nan, output[1]) if isinstance(output, tuple) else output * torch.nan
        return None

    seen, ids = Losses(), []
    student.register_forward_pre_hook(lambda model, args: ids.append(args[0].input_ids))
    module.register_forward_hook(poison)
    with pytest.raises(UserError) as caught:
        tiny.trainer(engine, make_step(engine.module), micro_rows=2, metrics=seen).fit()
    name = "lm_head_loss" if poisoned == "lm_head_loss" else f"lm.{poisoned}"
    assert f"beginning in the output of {name}, in rows 9, 10;" in caught.value.cause


def test_what_one_rank_finds_is_said_by_that_rank(capsys):
    class Damaged:
        def batch(self, rows):
            raise UserError("row 3 is damaged")

    for rank in (0, 1):
        engine = local_engine()
        engine.world.rank = rank
        with pytest.raises(UserError, match="row 3 is damaged"):
            trainer(engine, source=Damaged()).fit()
        assert capsys.readouterr().err == rank * "rank 1: row 3 is damaged\n"
