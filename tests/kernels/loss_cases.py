"""The Triton kernel of the losses against their PyTorch code, in the interpreter or on a GPU. Run by test_losses.py, or
directly:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/loss_cases.py
"""

import contextlib
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from head_problem import Adapted, distill, gradients, linear, problem, teacher_signal
from torch import nn

from rwkvinside.data.batch import Targets
from rwkvinside.families.base import LogitShape
from rwkvinside.hybrid.lm_head import LMHeadLoss, shape_logits
from rwkvinside.kernels.gpu import kernels, losses
from rwkvinside.losses.distillation import METRIC, DistillationLoss
from rwkvinside.losses.next_token import NextTokenLoss
from rwkvinside.losses.settings import DistillLossConfig
from rwkvinside.teacher.signals import HeadSignal, StoredSignal

DEVICE = "cpu" if kernels.INTERPRETED.value else "cuda"
TILE = losses.LANES * losses.WIDTH
# of a gradient, relative: half of the last bit that is stored; fp32: what sums over a vocabulary lose
ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
CONFIGS = [
    DistillLossConfig(divergence=kind, kl=kl, ce=ce, temperature=temperature)
    for kind in METRIC
    for kl, ce, temperature in ((0.7, 0.3, 1.0), (1.0, 0.0, 1.0), (0.7, 0.3, 2.0), (1.0, 0.0, 2.0), (0.0, 1.0, 0.5))
]
SIZES = [(97, 97), (TILE, TILE), (TILE + 1, TILE + 57), (2 * TILE + 8, TILE - 3)]  # vocabularies of student and teacher


def logits_of(rows, vocab, teacher_vocab, dtype=torch.float32):
    """Logits of a student and of a teacher that resembles it, and labels."""
    student = 3 * torch.randn(rows, max(vocab, teacher_vocab))
    teacher = (student + torch.randn_like(student))[:, :teacher_vocab]
    labels = torch.randint(0, min(vocab, teacher_vocab), (rows,))
    return student[:, :vocab].to(DEVICE, dtype).contiguous(), teacher.to(DEVICE, dtype).contiguous(), labels.to(DEVICE)


def chunk_of(logits):
    """What a teacher with these logits says."""
    return next(HeadSignal(logits, nn.Identity()).chunks(max(1, len(logits))))


def expected(loss, logits, labels, teacher=None):
    """Sums of the PyTorch code in float64, and the gradient of all columns."""
    chunk = None if teacher is None else chunk_of(teacher.double())
    values, grad = loss.block(logits.double(), labels, chunk, slice(None), True)
    return torch.stack(values).double(), F.pad(grad, (0, logits.shape[1] - grad.shape[1]))


def compared(loss, logits, labels, teacher=None, need_grad=True):
    """Sums of the kernel, and what it leaves in the logits."""
    comparison = loss.comparison(None if teacher is None else chunk_of(teacher))
    assert comparison.why_not(logits) is None
    found = logits.clone()
    return comparison.rows(found, labels, need_grad).sum(0, dtype=torch.float64), found


def agree(sums, wanted):
    """Sums over rows in fp32, each to some last bits of the largest logit."""
    return torch.allclose(sums, wanted, rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_sums_and_gradient_are_those_in_float64(config, dtype):
    loss = DistillationLoss(None, config)
    for vocab, teacher_vocab in SIZES:
        logits, teacher, labels = logits_of(3, vocab, teacher_vocab, dtype)
        wanted, wanted_grad = expected(loss, logits, labels, teacher)
        sums, grad = compared(loss, logits, labels, teacher)
        assert agree(sums, wanted) and sums[3] == wanted[3]
        assert (grad - wanted_grad).norm() <= ROUNDING[dtype] * wanted_grad.norm()
        assert not grad[:, min(vocab, teacher_vocab) :].any()


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_cross_entropy_needs_no_teacher(dtype):
    for vocab in (97, TILE + 1):
        logits, _, labels = logits_of(3, vocab, vocab, dtype)
        wanted, wanted_grad = expected(NextTokenLoss(), logits, labels)
        sums, grad = compared(NextTokenLoss(), logits, labels)
        assert agree(sums, wanted) and sums.shape == (2,)
        assert (grad - wanted_grad).norm() <= ROUNDING[dtype] * wanted_grad.norm()


def test_dtypes_may_differ_and_rows_lie_apart():
    logits, teacher, labels = logits_of(3, 200, 150)
    teacher = teacher.bfloat16()
    loss = DistillationLoss(None, DistillLossConfig(ce=0.1))
    wanted, wanted_grad = expected(loss, logits[:, :150], labels, teacher)
    beside = logits[:, 150:].clone()
    sums = loss.comparison(chunk_of(teacher)).rows(logits[:, :150], labels, True).sum(0, dtype=torch.float64)
    assert agree(sums, wanted)
    assert (logits[:, :150] - wanted_grad).norm() <= 1e-6 * wanted_grad.norm()
    assert torch.equal(logits[:, 150:], beside)


@pytest.mark.parametrize("loss", [DistillationLoss(None, DistillLossConfig(divergence=kind)) for kind in METRIC])
def test_without_gradient_the_logits_stay(loss):
    logits, teacher, labels = logits_of(2, 97, 97, torch.bfloat16)
    sums, found = compared(loss, logits, labels, teacher, need_grad=False)
    assert torch.equal(found, logits) and torch.equal(sums, compared(loss, logits, labels, teacher)[0])


def test_the_likeliest_of_equal_columns_is_the_first():
    logits, labels = torch.zeros(4, 2 * TILE, device=DEVICE), torch.zeros(4, dtype=torch.int64, device=DEVICE)
    teacher = logits.clone()
    logits[0, [9, TILE + 1, 700]] = teacher[0, 9] = 5.0  # tiles and lanes
    logits[1, [TILE + 1, 9]] = teacher[1, TILE + 1] = 5.0
    logits[2, [13, 12]] = teacher[2, 12] = 5.0
    teacher[3, 1] = 1e-6
    sums, _ = compared(DistillationLoss(None), logits, labels, teacher)
    assert sums[3] == (logits.argmax(-1) == teacher.argmax(-1)).sum() == 2


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.divergence != "reverse" or c.temperature == 1], ids=str)
def test_a_token_that_the_teacher_forbids(config):
    """The reverse divergence is as huge as in the reference (at another temperature T times that), and no NaN."""
    logits, teacher, labels = logits_of(3, TILE + 9, TILE + 9)
    teacher[:, 3] = teacher[:, TILE:] = -math.inf
    loss = DistillationLoss(None, config)
    wanted, wanted_grad = expected(loss, logits, labels % 3, teacher)
    sums, grad = compared(loss, logits, labels % 3, teacher)
    assert torch.allclose(sums, wanted, rtol=1e-5) and torch.isfinite(grad).all()
    assert (grad - wanted_grad).norm() <= 1e-5 * wanted_grad.norm()


def test_what_is_no_number_or_no_label_is_not_hidden():
    for wrong in ("student", "teacher", "label"):
        logits, teacher, labels = logits_of(2, 97, 97)
        if wrong == "label":
            labels[1] = 97
        else:
            (logits if wrong == "student" else teacher)[1, 5] = math.nan
        sums, _ = compared(DistillationLoss(None, DistillLossConfig(ce=0.5)), logits, labels, teacher)
        assert torch.isnan(sums[0]), wrong


@pytest.mark.parametrize("head", [None, Adapted(), nn.Linear(24, 97)], ids=["linear", "adapted", "bias"])
@pytest.mark.parametrize("config", CONFIGS[:3], ids=str)
def test_the_loss_of_hidden_states(config, head):
    """Loss, metrics, and gradients of hidden states and head, several chunks: next to those of the PyTorch code."""
    hidden, head, labels, *teacher = (x.to(DEVICE) for x in problem(head=copy.deepcopy(head)))
    hidden.requires_grad_()
    trained = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    chunked = config.model_copy(update={"chunk_tokens": 8})
    wanted, wanted_sums = distill(hidden, head, labels, teacher, chunked, backend="torch")
    loss, sums = distill(hidden, head, labels, teacher, chunked, backend="triton")
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    for name, value in wanted_sums.items():
        assert sums[name].item() == pytest.approx(value.item(), rel=1e-6)
    for got, want in zip(torch.autograd.grad(loss, trained), torch.autograd.grad(wanted, trained), strict=True):
        assert (got - want).norm() <= 1e-6 * want.norm()


@pytest.mark.parametrize("shape", [LogitShape(divisor=8.0), LogitShape(cap=0.5), LogitShape(2.0, 3.0)], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_logits_that_are_divided_or_capped(shape, backend):
    """What the kernel compares, and whose gradient it gives, are the model's logits, not the head's output."""
    hidden, head, labels, *_ = (x.to(DEVICE) for x in problem())
    hidden, head = hidden.requires_grad_(), head.requires_grad_()
    wanted = F.cross_entropy(
        shape_logits(head(hidden), shape).flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    loss, _ = LMHeadLoss(head, shape)(
        hidden, targets=Targets.of(labels), task=NextTokenLoss(chunk_tokens=8, backend=backend)
    )
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    trained = [hidden, head.weight]
    for got, want in zip(torch.autograd.grad(loss, trained), torch.autograd.grad(wanted, trained), strict=True):
        assert (got - want).norm() <= 2e-6 * want.norm()


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_a_loss_under_autocast(low):
    """The gradient of logits is rounded to their dtype by both."""
    hidden, head, labels, *teacher = (x.to(DEVICE) for x in problem())
    hidden.requires_grad_()
    both = []
    for backend in ("torch", "triton"):
        for loss in (
            DistillationLoss(teacher_signal(labels, *teacher), DistillLossConfig(ce=0.1, temperature=2.0), backend),
            NextTokenLoss(8, backend),
        ):
            with torch.autocast(DEVICE, dtype=low):
                value, sums = LMHeadLoss(head)(hidden, Targets.of(labels), loss)
            both.append((value, *sums.values(), *gradients(value, hidden, head)))
    for want, got in zip(both[:2], both[2:], strict=True):
        assert got[0].dtype == torch.float32
        for x, y in zip(want, got, strict=True):
            assert (x - y).norm() <= 1e-3 * x.norm()


class Capped(Adapted):
    """A head whose backward needs its logits."""

    def forward(self, x):
        return torch.tanh(super().forward(x))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_head_that_needs_its_logits_does_not_get_their_gradient_instead(backend):
    hidden, head, labels, *teacher = (x.to(DEVICE) for x in problem(head=Capped()))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        distill(hidden.requires_grad_(), head, labels, teacher, backend=backend)


@pytest.mark.parametrize("labeled", [0, 1])
def test_few_positions(labeled):
    hidden, head, labels, *teacher = (x.to(DEVICE) for x in problem())
    labels[0, labeled:] = -100
    labels[0, :labeled] = 5
    hidden.requires_grad_()
    loss, sums = distill(hidden, head, labels, teacher, backend="triton")
    wanted, wanted_sums = distill(hidden, head, labels, teacher, backend="torch")
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert all(sums[name].item() == pytest.approx(value.item(), rel=1e-6) for name, value in wanted_sums.items())
    for got, want in zip(gradients(loss, hidden, head), gradients(wanted, hidden, head), strict=True):
        assert torch.allclose(got, want, atol=1e-6)
    for evaluated in (torch.no_grad(), contextlib.nullcontext()):
        with evaluated:
            frozen, _ = distill(hidden.detach(), head.requires_grad_(False), labels, teacher, backend="triton")
        assert frozen.item() == loss.item() and not frozen.requires_grad


def test_positions_that_are_not_real_count_nowhere():
    """What fills labeled positions up to a fixed number: no loss, no metric, no gradient of anything."""
    hidden, head, labels, *teacher = (x.to(DEVICE) for x in problem())
    targets, teacher_hidden, weight = Targets.of(labels), teacher[0], teacher[1].to(DEVICE)
    found = []
    for given in (targets, targets.fixed(len(targets.positions) + 3)):
        signal = HeadSignal(given.take(teacher_hidden), linear(weight))
        config = DistillLossConfig(ce=0.3, chunk_tokens=len(targets.positions))
        own = hidden.clone().requires_grad_()
        loss, sums = LMHeadLoss(head)(own, given, DistillationLoss(signal, config, "triton"))
        found.append([loss, *sums.values(), *torch.autograd.grad(loss, [own, *head.parameters()])])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
    filled = targets.fixed(len(targets.positions) + 3)
    with pytest.raises(RuntimeError, match="positions that all count"):
        LMHeadLoss(head)(hidden, filled, NextTokenLoss(backend="torch"))


def test_what_the_kernel_does_not_compare_stays_with_pytorch(monkeypatch):
    """By name it is refused; by itself the choice is the device's, and of what is asked."""
    launched = []
    original = losses.compare_logits
    monkeypatch.setattr(losses, "compare_logits", lambda *a, **k: launched.append(a) or original(*a, **k))
    hidden, head, labels, *teacher = (x.to(DEVICE) for x in problem())
    chosen = F.linear(teacher[0][labels != -100], teacher[1]).log_softmax(-1)
    top, ids = chosen.topk(8)
    stored = StoredSignal(ids, torch.cat([top, (1 - top.exp().sum(-1, keepdim=True)).log()], -1), 97)
    for signal, config in ((teacher, DistillLossConfig(top_k=5)), (stored, None)):
        distill(hidden, head, labels, signal, config)
        with pytest.raises(RuntimeError, match="compares all logits"):
            distill(hidden, head, labels, signal, config, backend="triton")
    with pytest.raises(RuntimeError, match="float64"):
        LMHeadLoss(copy.deepcopy(head).double())(hidden.double(), Targets.of(labels), NextTokenLoss(backend="triton"))
    assert not launched
    distill(hidden, head, labels, teacher)
    assert len(launched) == (DEVICE == "cuda")
    distill(hidden, head, labels, teacher, backend="triton")
    assert len(launched) == 1 + (DEVICE == "cuda")


@pytest.mark.parametrize(
    "wrong",
    [{"kind": "backward"}, {"labels": torch.zeros(3, dtype=torch.int64)}, {"teacher": torch.zeros(2, 9).double()}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_the_op_refuses_what_does_not_fit(wrong):
    given = {"logits": torch.zeros(2, 9), "labels": torch.zeros(2, dtype=torch.int64), "teacher": torch.zeros(2, 9)}
    with pytest.raises(ValueError):
        losses.plan_compare(**given | wrong)
