"""Short distillations: what a candidate learns is what a hybrid built with these layers would, and nothing is left."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hybrid_cases import packed, teacher
from plans import stage_plan

from rwkvinside.conversion.build import make_engine
from rwkvinside.conversion.trials import SharedTrials, TrialSetup
from rwkvinside.errors import UserError
from rwkvinside.hybrid.model import HybridModel
from rwkvinside.hybrid.settings import StudentConfig
from rwkvinside.losses.distillation import DistillationLoss
from rwkvinside.stages.param_groups import rate_groups
from rwkvinside.stages.steps import DistillStep
from rwkvinside.teacher.signals import SelfTeacher
from rwkvinside.training.process_group import Distributed
from rwkvinside.training.trainer import Trainer, TrainingPlan

TOKENS = 64 * 3  # three steps


class Rows:
    """Endless random rows."""

    def batch(self, rows):
        parts = [packed([20, 12], seed=100 + row) for row in rows]
        fields = ("input_ids", "labels", "position_ids", "segment_ids")
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in fields}
        return replace(parts[0], **joined, rows=tuple(rows))


def student():
    torch.manual_seed(1)
    return HybridModel.from_teacher(teacher(layers=3), StudentConfig()).eval()


@pytest.fixture
def plan():
    optim = {"lr": 1e-2, "lr_rest": 1e-3, "lr_final": 1e-4, "warmup_steps": 0}
    shape = {"data": {"seq_len": 32}, "batch": {"tokens": 64}}
    return stage_plan(objective="distill", tokens=TOKENS, train=["mixer"], optim=optim, loss={}, **shape)


def divergence(model, layers=None):
    batch = packed([30], seed=7)
    loss = DistillationLoss(SelfTeacher().signal(model, batch))
    with torch.no_grad():
        return float(model(batch, "student", loss, layers=layers)[0])


@pytest.mark.parametrize("kept", [(), (0,), (2,)])
@pytest.mark.parametrize("checkpointing", [False, True, "recurrence"])
def test_a_trial_is_the_distillation_of_the_hybrid_itself(plan, kept, checkpointing):
    plan = replace(plan, settings=plan.settings.model_copy(update={"activation_checkpointing": checkpointing}))
    model, steps, known, saved = student(), [], {}, []
    before = {name: p.clone() for name, p in model.state_dict().items()}
    setup, save = TrialSetup((plan,), Rows(), ""), lambda: saved.append(dict(known))
    trials = SharedTrials(model, setup, Distributed("cpu"), known, save, steps.append)

    def score(kept):
        return divergence(model, dict.fromkeys(kept, "kept"))

    with torch.no_grad():  # as layers are measured
        (untrained,), (trained,) = trials([kept], 0, score), trials([kept], TOKENS, score)
    assert untrained == score(kept) and trained < untrained and sum(steps) == 3
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any(layer.training for layer in model.family.layers(model.lm))
    name = ",".join(map(str, kept)) or "none"
    assert known == {f"{name} 0": untrained, f"{name} {TOKENS}": trained} == saved[-1]

    built = student()
    built.keep_attention(kept)
    built.set_trainable(["mixer"])
    (phase,) = plan.phases
    groups = rate_groups(built, plan, phase)
    training = TrainingPlan("distill", plan.length, plan.schedule(groups), plan.shape.micro_rows)
    Trainer(make_engine(plan, phase, built, Distributed("cpu")), DistillStep(SelfTeacher()), Rows(), training).fit()
    assert divergence(built) == pytest.approx(trained, rel=1e-4)


def test_known_results_are_not_trained_again(plan):
    steps, known = [], {"1 192": 0.25}
    setup, fail = TrialSetup((plan,), Rows(), ""), lambda *_: pytest.fail("nothing is new")
    trials = SharedTrials(student(), setup, Distributed("cpu"), known, fail, steps.append)
    assert trials([(1,)], TOKENS, fail) == [0.25] and sum(steps) == 3


class Rank:
    """One of several threads that play the ranks of a run."""

    def __init__(self, rank, size, shares, barrier):
        self.rank, self.size, self.is_main, self.device = rank, size, rank == 0, torch.device("cpu")
        self._shares, self._barrier = shares, barrier

    def all_reduce_sum(self, values):
        self._barrier.wait()
        self._shares[self.rank] = values
        self._barrier.wait()
        return [sum(column) for column in zip(*self._shares, strict=True)]


@pytest.mark.parametrize(
    "known", [{}, {"none 0": 9.0, "0 0": 5.0}, {"none 0": 9.0, "0 0": 5.0, "1 0": 6.0, "2 0": 7.0}]
)
def test_ranks_share_what_rank_0_does_not_know(known):
    size, candidates, asked, saved = 3, [(), (0,), (1,), (2,)], [], []
    barrier, shares = threading.Barrier(size, timeout=20), [None] * size

    def work(rank):
        def score(kept):
            asked.append(kept)
            return kept[0] + 5.0 if kept else 9.0

        own = dict(known) if rank == 0 else {"1 0": 100.0}  # of an earlier run on other ranks: it does not count
        save = (lambda: saved.append(dict(own))) if rank == 0 else lambda: None
        world = Rank(rank, size, shares, barrier)
        trials = SharedTrials(None, TrialSetup((), Rows(), ""), world, own, save, lambda steps: None)
        return trials(candidates, 0, score)

    with ThreadPoolExecutor(size) as pool:
        found = list(pool.map(work, range(size)))
    assert found == [[9.0, 5.0, 6.0, 7.0]] * size
    names = {(): "none 0", (0,): "0 0", (1,): "1 0", (2,): "2 0"}
    assert sorted(asked) == [kept for kept in candidates if names[kept] not in known], "each by one of them"
    assert len(known) == 4 or saved[-1] == {"none 0": 9.0, "0 0": 5.0, "1 0": 6.0, "2 0": 7.0}


def test_a_trial_that_fails_leaves_the_student_as_it_was(plan):
    model = student()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    optim = plan.optim.model_copy(update={"lr": 1e30})
    wild = replace(plan, settings=plan.settings.model_copy(update={"optim": optim}))
    setup = TrialSetup((wild,), Rows(), "")
    trials = SharedTrials(model, setup, Distributed("cpu"), {}, lambda: None, lambda steps: None)
    with pytest.raises(UserError, match="stage distill, step 2"):
        trials([()], TOKENS, lambda kept: 0.0)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
