import io

import pytest
from toy_training import LENGTH, SCHEDULE, STEPS, Losses, Source, ToyStep, local_engine

from rwkvinside.errors import UserError
from rwkvinside.training import checkpoint as checkpoint_module
from rwkvinside.training.callbacks import Callback, Evaluate, MeasureMFU, ShowProgress, WriteMetrics
from rwkvinside.training.checkpoint import Checkpointer
from rwkvinside.training.metrics import Console
from rwkvinside.training.trainer import Trainer, TrainingPlan


class Diary(Callback):
    """Remembers what it is told."""

    def __init__(self, told, name=""):
        self.told, self.name = told, name

    def begin(self, trainer):
        self.told.append(f"{self.name}begin {trainer.done}")

    def end(self, trainer):
        self.told.append(f"{self.name}end {trainer.done}")

    def step(self, trainer, row):
        self.told.append(f"{self.name}step {row['step']}")

    def evaluation(self, trainer, row):
        self.told.append(f"{self.name}evaluation {row['step']}")


class OnRankZero(Diary):
    main_only = True


def trainer(callbacks, checkpointer=None, engine=None, **plan):
    plan = TrainingPlan("toy", LENGTH, SCHEDULE, 4, **plan)
    return Trainer(engine or local_engine(), ToyStep(), Source(), plan, checkpointer=checkpointer, callbacks=callbacks)


def test_callbacks_are_told_in_their_order():
    told = []
    trainer([Diary(told, "a "), Diary(told, "b ")]).fit(until=1)
    assert told == ["a begin 0", "b begin 0", "a step 1", "b step 1", "b end 1", "a end 1"]


def test_an_evaluation_is_a_row_only_where_something_is_evaluated():
    told = []
    trainer([Diary(told)], evaluate_every=1).fit()
    assert not any("evaluation" in each for each in told)
    told = []
    trainer([Diary(told), Evaluate(lambda done: {"kl": done / 2})], evaluate_every=5).fit()
    assert [each for each in told if "evaluation" in each] == ["evaluation 5", f"evaluation {STEPS}"]


def test_the_end_is_told_after_an_error_to_those_that_began():
    class Failing(Callback):
        def begin(self, trainer):
            raise UserError("no space")

    told = []
    with pytest.raises(UserError, match="no space"):
        trainer([Diary(told, "a "), Failing(), Diary(told, "b ")]).fit()
    assert told == ["a begin 0", "a end 0"]


def test_other_ranks_have_no_callbacks_of_rank_zero():
    engine, told = local_engine(), []
    engine.world.rank = 1
    trainer([Diary(told, "all "), OnRankZero(told, "main ")], engine=engine).fit(until=1)
    assert told == ["all begin 0", "all step 1", "all end 1"]


def test_mfu_is_in_the_rows_that_are_written_and_shown():
    rows, stream = Losses(), io.StringIO()
    console = ShowProgress(Console("toy", STEPS, stream=stream))
    trainer([MeasureMFU(1e6, 1e9), WriteMetrics(rows), console]).fit()
    for row in rows.rows:
        assert row["mfu"] == pytest.approx(row["tokens_per_s"] * 1e-3)
    assert f"MFU {100 * rows.rows[-1]['mfu']:.1f} %" in stream.getvalue()


def test_a_checkpoint_that_found_no_space_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "free_bytes", lambda directory: 0)
    stream = io.StringIO()
    console, told = ShowProgress(Console("toy", STEPS, stream=stream)), Checkpointer(tmp_path, {}, 2, "continue")
    with pytest.raises(UserError, match="cannot write checkpoint"):  # the last one
        trainer([console], told, save_every=6).fit()
    assert f"toy 6/{STEPS}  NOT SAVED: the disk is full" in stream.getvalue()
