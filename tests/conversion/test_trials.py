"""Short distillations: what a candidate learns is what a hybrid built with these layers would, and nothing is left."""

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
@pytest.mark.parametrize("checkpointing", [False, True])
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
