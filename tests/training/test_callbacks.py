import io

import pytest
from toy_training import LENGTH, SCHEDULE, STEPS, Losses, Source, ToyStep, local_engine

from rwkvinside.errors import UserError
from rwkvinside.training import checkpoint as checkpoint_module
from rwkvinside.training.callbacks import Callback, Evaluate, MeasureMFU, ShowProgress, WatchValidation, WriteMetrics
from rwkvinside.training.checkpoint import Checkpointer, checkpoint_directories, read_score
from rwkvinside.training.metrics import Console, Score
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
    assert f"MFU {100 * rows.rows[-1]['mfu']:.0f} %" in stream.getvalue()


def test_a_checkpoint_that_found_no_space_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "free_bytes", lambda directory: 0)
    stream = io.StringIO()
    console, told = ShowProgress(Console("toy", STEPS, stream=stream)), Checkpointer(tmp_path, {}, 2, "continue")
    with pytest.raises(UserError, match="cannot write checkpoint"):  # the last one
        trainer([console], told, save_every=6).fit()
    assert f"toy 6/{STEPS}  NOT SAVED: the disk is full" in stream.getvalue()


class Scripted:
    """Evaluations whose KL is given by the step."""

    def __init__(self, values, **labels):
        self.values, self.labels = values, labels

    def __call__(self, done):
        return {"ce": 0.0, "kl": self.values[done], **self.labels}


def told_of(values, tmp_path, scores=(), checkpointer=None, resume=False, save_every=1, **labels):
    """The lines about validation of a toy stage that is evaluated at each step."""
    stream = io.StringIO()
    console = ShowProgress(Console("toy", STEPS, stream=stream))
    evaluate = Evaluate(Scripted(values, **labels))
    toy = trainer([evaluate, console, WatchValidation(scores)], checkpointer, evaluate_every=1, save_every=save_every)
    if resume:
        toy.restore(checkpointer.load())
    toy.fit()
    return [line for line in stream.getvalue().splitlines() if "WORSE" in line]


def falling(**changed):
    """KL by step: falls by a tenth each, but for some steps."""
    return {step: 0.9**step for step in range(1, STEPS + 1)} | {int(name[1:]): v for name, v in changed.items()}


def test_a_rising_validation_score_is_said_while_it_happens(tmp_path):
    assert told_of(falling(), tmp_path) == []
    assert told_of(falling(s5=0.9**4 * 1.049), tmp_path) == [], "within the noise"
    [line] = told_of(falling(s5=0.9**4 * 1.2), tmp_path)
    assert line.startswith(f"toy 5/{STEPS}  WORSE ON VALIDATION: kl 0.7873, best of the stage 0.6561 at step 4")
    assert "lower stages.toy.tokens or optim.lr; the best checkpoint is kept, and export takes it" in line
    [line] = told_of(falling(s5=0.9**4 * 1.2), tmp_path, save_every=3)
    assert "best of the stage 0.6561 at step 4" in line and "nothing was saved there: save more often" in line


def test_a_stage_is_compared_with_its_start_by_the_same_measure(tmp_path):
    said = told_of(falling(), tmp_path, [Score(0, 0.4, "kl")])
    assert len(said) == sum(value > 0.42 for value in falling().values()) > 3
    assert "best of the stage 0.4 at its start" in said[0] and "or leave the stage out" in said[0]
    assert told_of(falling(), tmp_path, [Score(0, 0.4, "ce")]) == []
    assert told_of(falling(), tmp_path, [Score(0, 0.4, "kl")], teacher="quantized") == []


def test_a_resumed_stage_knows_its_best_and_keeps_the_same_checkpoints(tmp_path):
    values = falling(s3=0.01)
    straight, stopped = (Checkpointer(tmp_path / name / "toy", {}, keep=2) for name in ("straight", "stopped"))
    said = told_of(values, tmp_path, checkpointer=straight)
    trainer([Evaluate(Scripted(values))], stopped, evaluate_every=1, save_every=1).fit(until=6)
    scores = [read_score(path) for path in checkpoint_directories(stopped.directory)]
    assert [score.step for score in scores] == [3, 5, 6]
    again = told_of(values, tmp_path, scores, checkpointer=stopped, resume=True)
    assert said[-len(again) :] == again and len(again) == STEPS - 6
    assert straight.names() == stopped.names() == ["step-00000003", *straight.names()[-2:]]
    for name in straight.names():
        a, b = (folder.directory / name / "state.json" for folder in (straight, stopped))
        assert a.read_text() == b.read_text(), "weights, moments, generators and scores are the same"


def test_checkpoints_are_evaluated_where_evaluations_are_asked_for(tmp_path):
    told = []
    evaluate, checkpointer = Evaluate(Scripted(falling())), Checkpointer(tmp_path, {})
    trainer([Diary(told), evaluate], checkpointer, evaluate_every=5, save_every=3).fit()
    due = [step for step in range(1, STEPS + 1) if step % 5 == 0 or step % 3 == 0 or step == STEPS]
    assert [each for each in told if "evaluation" in each] == [f"evaluation {step}" for step in due]
    told = []
    trainer([Diary(told), evaluate], Checkpointer(tmp_path / "more", {}), save_every=3).fit()
    assert [each for each in told if "evaluation" in each] == [f"evaluation {STEPS}"], "0: after the last step alone"
