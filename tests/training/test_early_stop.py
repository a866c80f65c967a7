"""The end of a stage whose evaluations have stopped improving: counted, agreed on by ranks, kept over a resume."""

import io

import pytest
from pydantic import ValidationError
from toy_training import STEPS, Losses, local_engine, trainer

from rwkvinside.stages.settings import StageConfig
from rwkvinside.training.checkpoint import Checkpointer
from rwkvinside.training.metrics import Console, Score
from rwkvinside.training.schedule import EarlyStop
from rwkvinside.training.settings import EarlyStopConfig

FALLING = [1.0, 0.8, 0.79, 0.78, 0.77, 0.5, 0.5, 0.5]  # after each of the toy's steps


def counted(values, patience=2, min_delta=0.05):
    """The evaluation, from 1, after which patience has run out; None: it never does."""
    stop = EarlyStop(EarlyStopConfig(patience=patience, min_delta=min_delta))
    for number, value in enumerate(values, 1):
        stop.note(value if isinstance(value, Score | None) else Score(number, value, "kl"))
        if stop.due:
            return number
    return None


def test_patience_counts_evaluations_in_a_row_without_improvement():
    assert counted(FALLING) == 4, "0.79 and 0.78 are less than 0.05 below 0.8"
    assert counted(FALLING, patience=3) == 5
    assert counted(FALLING, patience=4) is None, "0.5 comes just in time, and two evaluations follow"
    assert counted(FALLING, min_delta=0) == 8, "any fall is an improvement, an equal number is none"
    assert counted([1.0, 0.97, 0.94, 0.91, 0.88]) is None, "slow progress adds up"
    assert counted([1.0, None, None]) == 3, "numbers that are not finite are no improvement"
    assert counted([1.0, 1.1, Score(3, 9.0, "kl", "another teacher"), 9.1]) is None, "not comparable: a new beginning"


def stopping(checkpointer, stream=None, values=FALLING, patience=2, **options):
    stop = EarlyStopConfig(patience=patience, min_delta=0.05)
    options = {"evaluate": lambda done: {"kl": values[done - 1]}, "evaluate_every": 1, "early_stop": stop} | options
    if stream is not None:
        options["console"] = Console("toy", STEPS, stream=stream)
    return trainer(local_engine(), checkpointer=checkpointer, metrics=Losses(), **options)


def test_a_stage_ends_early_says_so_and_saves(tmp_path):
    stream, checkpointer = io.StringIO(), Checkpointer(tmp_path, {}, keep=1)
    toy = stopping(checkpointer, stream, save_every=2)
    toy.fit()
    assert (toy.done, toy.finished, toy.early_end.step, toy.early_end.steps) == (4, True, 4, STEPS)
    assert toy.early_end.best == Score(2, 0.8, "kl")
    said = f"toy 4/{STEPS}  STOPS EARLY: validation KL has not improved by 0.05 in 2 evaluations; best 0.8 at step 2"
    assert said in stream.getvalue()
    saved = checkpointer.load()
    assert (saved.step, saved.state["finished"]) == (4, True)
    assert checkpointer.names() == ["step-00000004"], "0.78 is the best number, if not by min_delta"


def test_a_stage_that_improves_goes_on_to_its_end(tmp_path):
    toy = stopping(Checkpointer(tmp_path, {}), patience=4)
    toy.fit()
    assert (toy.done, toy.early_end) == (STEPS, None)
    toy = stopping(Checkpointer(tmp_path / "last", {}), values=[1.0] * STEPS, patience=STEPS - 1)
    toy.fit()
    assert (toy.done, toy.early_end) == (STEPS, None), "patience that runs out at the last step stops nothing"


@pytest.mark.parametrize("at", [1, 3, 4])
def test_a_resumed_stage_ends_where_it_would_have(tmp_path, at):
    """After 4 steps it has ended: nothing more is trained."""
    straight, stopped = (Checkpointer(tmp_path / name / "toy", {}, keep=9) for name in ("straight", "stopped"))
    stopping(straight, save_every=1).fit()
    stopping(stopped, save_every=1).fit(until=at)
    resumed = stopping(stopped, save_every=1)
    resumed.restore(stopped.load())
    resumed.fit()
    assert resumed.done == 4 and resumed.early_end.best == Score(2, 0.8, "kl")
    for name in straight.names():
        a, b = (folder.directory / name / "state.json" for folder in (straight, stopped))
        assert a.read_text() == b.read_text()
    patient = stopping(stopped, patience=4, save_every=1)
    patient.restore(stopped.load())
    patient.fit()
    assert (patient.done, patient.early_end) == (STEPS, None), "with more patience it goes on"


def test_what_cannot_stop_early_is_refused():
    given = {"objective": "distill", "tokens": 4096, "data": {"seq_len": 32}, "batch": {"tokens": 128}}
    given |= {"train": [".*"], "optim": {}, "loss": {"kl": 1.0, "ce": 0.0}, "early_stop": {"patience": 3}}
    with pytest.raises(ValidationError, match="early_stop counts evaluations, but there are none"):
        StageConfig.model_validate(given)
    assert StageConfig.model_validate(given | {"evaluate_every_tokens": "1k"}).early_stop.min_delta == 0
    with pytest.raises(ValidationError, match="patience"):
        StageConfig.model_validate(given | {"evaluate_every_tokens": "1k", "early_stop": {"patience": 0}})
