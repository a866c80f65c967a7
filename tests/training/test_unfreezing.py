"""A stage in which part of the toy joins after three steps, against two optimizers written out by hand."""

from functools import partial

import pytest
import torch
from toy_training import (
    BOUNDARY,
    LENGTH,
    ROWS_PER_STEP,
    SETTINGS,
    STEPS,
    UNFREEZING,
    Losses,
    Source,
    ToyStep,
    model,
    phase,
    phase_groups,
)

from rwkvinside.errors import UserError
from rwkvinside.training.checkpoint import Checkpointer
from rwkvinside.training.deepspeed_engine import LocalEngine
from rwkvinside.training.optimizer import decays
from rwkvinside.training.process_group import Distributed

in_this_process = partial(LocalEngine, settings=SETTINGS, world=Distributed("cpu"))


def by_hand(steps=STEPS):
    """The mixer's optimizer goes on, what joins has a new one that begins with step 4."""
    toy, source, step = model(dropout=0.0), Source(), ToyStep()
    optimizers = {}
    for number in range(1, steps + 1):
        groups = phase_groups(toy, number > BOUNDARY)
        for name in groups.keys() - optimizers.keys():
            parts = [
                {"params": [p for key, p in groups[name].items() if decays(key, p) == matrix], "weight_decay": decay}
                for matrix, decay in ((True, SETTINGS.weight_decay), (False, 0.0))
            ]
            optimizers[name] = torch.optim.AdamW(parts, betas=SETTINGS.betas, eps=SETTINGS.eps, fused=True)
        first = (number - 1) * ROWS_PER_STEP
        batches = [source.batch(range(first + i, first + i + 4)) for i in (0, 4)]
        count = sum(step.count(batch) for batch in batches)
        for batch in batches:
            (step(toy, batch)[0] / count).backward()
        parameters = [p for group in groups.values() for p in group.values()]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.nn.utils.clip_grad_norm_(parameters, SETTINGS.clip)
        for name, rate in UNFREEZING.rates(number, LENGTH).items():
            for group in optimizers[name].param_groups if name in optimizers else ():
                group["lr"] = rate
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
    return toy, optimizers


def test_two_phases_are_two_optimizers(tmp_path):
    checkpointer, losses = Checkpointer(tmp_path, {}), Losses()
    start = model(dropout=0.0)
    phase(in_this_process, checkpointer, joined=False, metrics=losses).fit(until=BOUNDARY)
    middle = checkpointer.load()
    assert middle.step == BOUNDARY and not middle.state["finished"]
    assert set(middle.tensors()) == set(start.groups()["mixer"])
    second = phase(in_this_process, checkpointer, joined=True, metrics=losses)
    assert all(torch.equal(p, start.groups()["rest"][n]) for n, p in second.engine.model.groups()["rest"].items())
    second.fit()
    toy, optimizers = by_hand()
    last, state = checkpointer.load().tensors(), checkpointer.load().optimizer()
    named = dict(toy.named_parameters())
    assert set(last) == {n for n in named if not n.startswith("frozen")}
    for name, tensor in last.items():
        own = next(o.state[named[name]] for o in optimizers.values() if named[name] in o.state)
        assert torch.equal(tensor, named[name].detach()), name
        assert all(torch.equal(state[f"{name}/{moment}"], own[moment]) for moment in ("exp_avg", "exp_avg_sq"))
        # the number of its own updates, on which Adam's bias correction depends
        assert int(state[f"{name}/step"]) == int(own["step"]) == (STEPS if name in toy.groups()["mixer"] else 5)
    assert "lr_rest@144" not in losses.rows[2] and losses.rows[3]["lr_rest@144"] == 1e-2 / 2
    assert [row["step"] for row in losses.rows] == list(range(1, STEPS + 1))


class Stop(Exception):
    """A crash between the update and the checkpoint."""


@pytest.mark.parametrize("crash_at", [2, 3, 4, 6])
def test_resumed_anywhere_it_is_bit_identical(tmp_path, crash_at):
    """With dropout. A checkpoint of the boundary belongs to the first phase and opens the second."""

    def run(directory, crash_at=None):
        def evaluate(step):
            if step == crash_at:
                raise Stop
            return {}

        checkpointer = Checkpointer(directory, {})
        done = checkpointer.load().step if checkpointer.names() else 0
        options = {"dropout": 0.1, "save_every": 5, "evaluate": evaluate, "evaluate_every": 1}
        if done < BOUNDARY:
            phase(in_this_process, checkpointer, joined=False, **options).fit(until=BOUNDARY)
        phase(in_this_process, checkpointer, joined=True, **options).fit()
        return checkpointer.load()

    torch.manual_seed(1)
    straight = run(tmp_path / "a")
    torch.manual_seed(1)
    with pytest.raises(Stop):
        run(tmp_path / "b", crash_at)
    torch.manual_seed(1 if crash_at <= BOUNDARY else 99)  # before the first checkpoint there is none to take it from
    resumed = run(tmp_path / "b")
    for a, b in ((straight.tensors(), resumed.tensors()), (straight.optimizer(), resumed.optimizer())):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_what_does_not_join_now_must_have_its_state(tmp_path):
    checkpointer = Checkpointer(tmp_path, {})
    phase(in_this_process, checkpointer, joined=False).fit(until=BOUNDARY)
    with pytest.raises(UserError, match="do not fit"):
        phase(in_this_process, checkpointer, joined=True, restore=False).restore(checkpointer.load())
