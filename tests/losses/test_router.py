"""The balance of experts, judged by the function of transformers."""

import pytest
import torch
from hybrid_cases import VOCAB, doubled, packed, teacher
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from rwkvinside.data.batch import IGNORE, Batch
from rwkvinside.hybrid.model import HybridModel, Routing
from rwkvinside.hybrid.settings import StudentConfig
from rwkvinside.losses.router import router_loss
from rwkvinside.losses.settings import DistillLossConfig
from rwkvinside.stages.steps import DistillStep, SftStep
from rwkvinside.teacher.signals import SelfTeacher
from rwkvinside.training.local_engine import LocalEngine
from rwkvinside.training.process_group import Distributed
from rwkvinside.training.settings import OptimConfig

EXPERTS, CHOSEN = 4, 2
WEIGHT = 0.7


def padded(lengths, T=16, seed=1):
    g = torch.Generator().manual_seed(seed)
    real = torch.arange(T) < torch.tensor(lengths)[:, None]
    ids = torch.randint(1, VOCAB, real.shape, generator=g) * real
    labels = torch.where(real, ids, IGNORE)
    labels[:, 0] = IGNORE
    positions = torch.arange(T).expand(len(lengths), -1) * real
    return Batch(ids, labels, positions, real.int(), tuple(range(len(lengths))))


def rows_of(batch):
    parts = zip(batch.input_ids, batch.labels, batch.position_ids, batch.segment_ids, strict=True)
    return [Batch(*(x[None] for x in part), rows=(i,)) for i, part in enumerate(parts)]


def student():
    model = HybridModel.from_teacher(doubled(teacher("qwen3_moe")), StudentConfig(attention_layers=(1,))).double()
    model.set_trainable([".*"])
    return model


@pytest.mark.parametrize("batch", [packed([9, 7], rows=3), padded([16, 5, 1])], ids=["packed", "padded"])
def test_each_row_is_what_transformers_computes_of_it(batch):
    g = torch.Generator().manual_seed(0)
    B, T = batch.input_ids.shape
    logits = tuple(torch.randn(B * T, EXPERTS, generator=g, dtype=torch.float64).requires_grad_() for _ in range(3))
    found = router_loss(Routing(logits, CHOSEN), batch)
    wanted = 0
    for i in range(B):
        row = tuple(x.view(B, T, EXPERTS)[i] for x in logits)
        value = load_balancing_loss_func(row, EXPERTS, CHOSEN, batch.mask[i : i + 1])
        wanted = wanted + value * (batch.labels[i] != IGNORE).sum()
    torch.testing.assert_close(found, wanted.double(), rtol=1e-6, atol=0)  # theirs adds up in fp32
    for x, y in zip(torch.autograd.grad(found, logits), torch.autograd.grad(wanted, logits), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["distill", "sft"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_adds_it_with_its_weight_and_names_it(kind, checkpointing):
    model, batch = student(), padded([16, 5, 9])
    if checkpointing:
        model.recompute("layers")
    config = DistillLossConfig(router=WEIGHT)
    plain, with_router = (
        (DistillStep(SelfTeacher()), DistillStep(SelfTeacher(), config))
        if kind == "distill"
        else (SftStep(), SftStep(router=WEIGHT))
    )
    before, metrics = plain(model, batch)
    loss, found = with_router(model, batch)
    assert found.keys() - metrics.keys() == {"router"}
    torch.testing.assert_close(loss, before + WEIGHT * found["router"], rtol=1e-12, atol=0)

    # what transformers' own forward says of a student's router logits, one row at a time
    expected = 0
    for row in rows_of(batch):
        _, routing = model(row, routers=True)
        assert len(routing.logits) == 2, "one of the three layers is dense"
        value = load_balancing_loss_func(routing.logits, EXPERTS, CHOSEN, row.mask)
        expected = expected + value * row.num_targets
    torch.testing.assert_close(found["router"], expected.detach().double(), rtol=1e-6, atol=0)
    name = "lm.model.layers.2.mlp.gate.weight"
    gate = dict(model.named_parameters())[name]
    grad = torch.autograd.grad(loss - before, gate)[0]
    exact = torch.autograd.grad(WEIGHT * expected, gate)[0]
    torch.testing.assert_close(grad, exact, rtol=1e-4, atol=1e-7)
    assert grad.any()


def test_micro_batches_change_nothing():
    """A step of three rows at once, and of one after the other: the same loss, metric and update."""
    batch, results = padded([16, 5, 9]), []
    for micro_batches in ([batch], rows_of(batch)):
        model = student().float()
        groups = {"all": {n: p for n, p in model.canonical_parameters().items() if p.requires_grad}}
        engine = LocalEngine(model, groups, OptimConfig(), Distributed(torch.device("cpu")))
        engine.set_rates({"all": 0.0})
        step = DistillStep(SelfTeacher(), DistillLossConfig(router=WEIGHT))
        results.append(engine.train_step(micro_batches, step, batch.num_targets))
    first, second = results
    assert first.loss == pytest.approx(second.loss, rel=1e-5)
    assert first.metrics["router"] == pytest.approx(second.metrics["router"], rel=1e-5) and first.metrics["router"] >= 1
    assert first.grad_norm == pytest.approx(second.grad_norm, rel=1e-4)


def test_a_balanced_router_has_one():
    logits = torch.eye(EXPERTS).repeat_interleave(2, 0) + torch.eye(EXPERTS).roll(1, 1).repeat_interleave(2, 0)
    value = router_loss(Routing((10 * logits,), CHOSEN), Batch(*_even(8), rows=(0,)))
    assert value / 8 == pytest.approx(CHOSEN, rel=1e-5)  # f adds up to the number of experts of a token


def _even(length):
    ids = torch.ones(1, length, dtype=torch.long)
    return ids, ids, torch.arange(length)[None], ids.int()
