"""The loop over chunks: what it computes, in which precision, and what is in memory at a time."""

import weakref

import pytest
import torch
from head_problem import Adapted, distill, gradients, linear, problem
from torch import nn

from rwkvinside.data.batch import Targets
from rwkvinside.hybrid.lm_head import LinearHead, LMHeadLoss, open_head
from rwkvinside.losses.chunked import chunk_slices, chunk_tokens, open_chunks
from rwkvinside.losses.next_token import NextTokenLoss
from rwkvinside.losses.settings import DistillLossConfig
from rwkvinside.teacher.signals import HeadSignal


def test_nothing_is_prepared_that_nobody_needs(monkeypatch):
    hidden, head, labels, *teacher = problem()
    made = []
    monkeypatch.setattr(LinearHead, "backward", lambda self, *args: made.append(args))
    o = DistillLossConfig(chunk_tokens=8)
    with torch.no_grad():
        loss, _ = distill(hidden.requires_grad_(), head, labels, teacher, o)
    frozen, _ = distill(hidden.detach(), head.requires_grad_(False), labels, teacher, o)
    assert not made and not loss.requires_grad and not frozen.requires_grad
    assert loss.item() == frozen.item() > 0


def test_a_frozen_head_gets_no_gradient_and_a_second_backward_is_refused():
    hidden, head, labels, *teacher = problem()
    head.requires_grad_(False)
    loss, _ = distill(hidden.requires_grad_(), head, labels, teacher)
    loss.backward(retain_graph=True)
    assert hidden.grad.any() and head.weight.grad is None
    with pytest.raises(RuntimeError, match="handed out"):
        loss.backward()


@pytest.mark.parametrize("head", [None, Adapted()], ids=["linear", "adapted"])
def test_autocast_multiplies_in_bf16_and_sums_in_fp32(head):
    hidden, head, labels, *teacher = problem(head=head)
    head.requires_grad_(True)
    hidden.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = distill(hidden, head, labels, teacher, DistillLossConfig(chunk_tokens=5))
        logits = open_head(head).forward(hidden[0])
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    exact, _ = distill(hidden, head, labels, teacher)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-2)
    for got, want in zip(gradients(loss, hidden, head), gradients(exact, hidden, head), strict=True):
        assert got.dtype == want.dtype and (got - want).norm() < 2e-2 * want.norm()


def test_gradients_of_a_bf16_head_add_up_in_fp32():
    """4096 equal contributions to one entry: bf16 sums would stop growing at 256."""
    head = nn.Linear(1, 2, bias=False).bfloat16()
    nn.init.zeros_(head.weight)
    hidden = torch.ones(1, 4096, 1, dtype=torch.bfloat16)
    loss, _ = LMHeadLoss(head)(hidden, Targets.of(torch.zeros(1, 4096).long()), NextTokenLoss(chunk_tokens=1))
    (grad,) = torch.autograd.grad(loss, [head.weight])
    assert grad.dtype == torch.bfloat16 and grad.flatten().tolist() == [-2048, 2048]


def test_chunk_size_follows_the_vocabulary():
    assert [chunk_tokens(vocab) for vocab in (512, 151_936, 2**30)] == [98304, 331, 1]
    assert chunk_tokens(151_936, "cuda") == 1325


def test_a_chunk_is_cut_even_of_nothing():
    assert [(s.start, s.stop) for s in chunk_slices(7, 3)] == [(0, 3), (3, 6), (6, 9)]
    assert list(chunk_slices(0, 3)) == [slice(0, 3)]
    with open_chunks(None, 3) as chunks:
        assert next(chunks) is None and next(chunks) is None


class Gathered:
    """The context of a teacher whose head is in shards: when it is entered and left."""

    def __init__(self):
        self.entered = self.left = 0

    def __call__(self):
        return self

    def __enter__(self):
        self.entered += 1

    def __exit__(self, *exc):
        self.left += 1


@pytest.mark.parametrize("labeled", [True, False])
@pytest.mark.parametrize("chunk", [1, 8, 1000])
def test_the_teachers_head_is_gathered_once_for_all_chunks(chunk, labeled):
    """Also on a rank without a single position: gathering is collective."""
    hidden, head, labels, teacher_hidden, weight = problem()
    labels = labels if labeled else torch.full_like(labels, -100)
    gathered = Gathered()
    signal = HeadSignal(teacher_hidden[labels != -100], linear(weight), gathered)
    distill(hidden, head, labels, signal, DistillLossConfig(chunk_tokens=chunk))
    assert (gathered.entered, gathered.left) == (1, 1)


def test_the_teachers_head_is_let_go_when_a_chunk_fails(monkeypatch):
    hidden, head, labels, teacher_hidden, weight = problem()
    gathered = Gathered()
    signal = HeadSignal(teacher_hidden[labels != -100], linear(weight), gathered)

    def broken(self, *args):
        assert (gathered.entered, gathered.left) == (1, 0)
        raise FloatingPointError

    monkeypatch.setattr(LinearHead, "backward", broken)
    with pytest.raises(FloatingPointError):
        distill(hidden, head, labels, signal, DistillLossConfig(chunk_tokens=8))
    assert gathered.left == 1


@pytest.mark.parametrize("head", [None, Adapted()], ids=["linear", "adapted"])
def test_one_chunk_of_logits_a_model_is_in_memory_at_a_time(head, monkeypatch):
    hidden, head, labels, *teacher = problem(head=head)
    made, alive = [], []
    for kind in {LinearHead, type(open_head(head))}:
        forward = kind.forward

        def noting(self, x, forward=forward):
            logits = forward(self, x)
            made.append(weakref.ref(logits))
            alive.append(sum(one() is not None for one in made))
            return logits

        monkeypatch.setattr(kind, "forward", noting)
    distill(hidden.requires_grad_(), head, labels, teacher, DistillLossConfig(chunk_tokens=8))
    assert len(made) == 2 * 5 and max(alive) == 2  # of 35 positions with a label, of student and teacher
    made.clear(), alive.clear()
    LMHeadLoss(head)(hidden, Targets.of(labels), NextTokenLoss(8))
    assert len(made) == 5 and max(alive) == 1
