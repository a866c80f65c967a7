import math

import pytest

from rwkvinside.errors import UserError
from rwkvinside.training.schedule import Schedule, StageLength


def test_steps_cover_the_tokens():
    assert StageLength(600_000, 4096, 256).steps == 147
    assert StageLength(4096, 4096, 256).steps == 1
    uneven = StageLength(10_000, 1000, 300)  # three rows of 300 fit into 1000
    assert (uneven.rows_per_step, uneven.tokens_per_step, uneven.steps) == (3, 900, 12)
    assert StageLength(600_000, 4096, 256).steps_for(41_000) == 10
    assert StageLength(600_000, 4096, 256).steps_for(1) == 1


@pytest.mark.parametrize("bad", [(0, 4096, 256), (100, 128, 256), (100, 128, 0)])
def test_impossible_budgets_are_refused(bad):
    with pytest.raises(UserError):
        StageLength(*bad)


def test_cosine_over_the_whole_stage():
    length = StageLength(100, 1, 1)
    schedule = Schedule({"mixer": 1e-3, "rest": 1e-5}, {"mixer": 1e-5})
    assert schedule.rates(1, length) == {"mixer": 1e-3, "rest": 1e-5}
    assert schedule.rates(51, length)["mixer"] == pytest.approx((1e-3 + 1e-5) / 2)
    quarter = 1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi / 4)) / 2
    assert schedule.rates(26, length)["mixer"] == pytest.approx(quarter)
    assert schedule.rates(100, length)["rest"] == 1e-5  # no final value: stays
    mixer = [schedule.rates(s, length)["mixer"] for s in range(1, 101)]
    assert all(a > b for a, b in zip(mixer, mixer[1:], strict=False)) and mixer[-1] < 1.4e-5


def test_late_decay_of_the_distillation_recipe():
    length = StageLength(1000, 1, 1)
    schedule = Schedule({"mixer": 1e-4}, {"mixer": 1e-5}, warmup_steps=50, start=0.833, end=0.875)
    rate = [schedule.rates(s, length)["mixer"] for s in range(1, 1001)]
    assert rate[0] == pytest.approx(1e-4 / 50) and rate[24] == pytest.approx(1e-4 / 2)  # warm-up
    assert all(r == 1e-4 for r in rate[49:834])  # constant
    assert rate[833 + 21] == pytest.approx(5.5e-5)  # half-way down
    assert all(r == pytest.approx(1e-5) for r in rate[875:])  # flat


def test_linear_decay_and_an_abrupt_one():
    length = StageLength(10, 1, 1)
    linear = Schedule({"mixer": 1.0}, {"mixer": 0.0}, shape="linear")
    assert [round(linear.rates(s, length)["mixer"], 12) for s in (1, 6, 10)] == [1.0, 0.5, 0.1]
    abrupt = Schedule({"mixer": 1.0}, {"mixer": 0.0}, start=0.5, end=0.5)
    assert [abrupt.rates(s, length)["mixer"] for s in (5, 6)] == [1.0, 0.0]


def test_what_joins_later_warms_up_later():
    length = StageLength(100, 1, 1)
    schedule = Schedule({"mixer": 1.0, "rest@40": 2.0}, {}, first={"rest@40": 40}, warmup_steps=10)
    assert [schedule.rates(step, length)["rest@40"] for step in (41, 45, 50, 51)] == [0.2, 1.0, 2.0, 2.0]
    assert [schedule.rates(step, length)["mixer"] for step in (5, 41)] == [0.5, 1.0]


@pytest.mark.parametrize("bad", [{"shape": "cos"}, {"start": 0.9, "end": 0.5}, {"end": 1.5}])
def test_bad_schedules_are_refused(bad):
    with pytest.raises(UserError):
        Schedule({"mixer": 1.0}, {}, **bad)
