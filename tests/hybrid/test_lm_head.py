"""Heads opened for a loop over chunks, and what `LMHeadLoss` owns."""

import pytest
import torch
from head_problem import Adapted, linear, problem
from torch import nn

from rwkvinside.data.batch import Targets
from rwkvinside.hybrid.lm_head import LMHeadLoss, Logits, logits_function, open_head


@pytest.mark.parametrize("head", [None, nn.Linear(24, 97), Adapted()], ids=["linear", "bias", "adapted"])
def test_an_opened_head_is_the_head(head):
    """Logits, and gradients of two chunks that add up, against autograd in float64."""
    hidden, head, *_ = problem(torch.float64, head=head)
    x = hidden[0].requires_grad_()
    weights = torch.randn(len(x), 97, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    trained = [p for p in head.parameters() if p.requires_grad]
    want = torch.autograd.grad((head(x) * weights).sum(), [x, *trained])
    opened, grads = open_head(head), []
    for part in (slice(0, 30), slice(30, None)):
        assert torch.allclose(opened.forward(x[part]), head(x[part]), rtol=1e-13)
        grads.append(opened.backward(weights[part].clone(), inputs=True))
    assert opened.out_features == 97 and opened.parameters == trained
    for got, exact in zip([torch.cat(grads), *opened.gradients], want, strict=True):
        assert (got - exact).norm() <= 1e-13 * exact.norm()


@pytest.mark.parametrize("head", [nn.Linear(24, 97), Adapted()], ids=["linear", "adapted"])
def test_logits_without_gradients_are_those_of_the_head(head):
    hidden, head, labels, *_ = problem(head=head)
    with torch.no_grad():
        assert torch.equal(logits_function(head)(hidden), head(hidden))
        assert torch.equal(LMHeadLoss(head)(hidden, Targets.of(labels), Logits()), head(hidden))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = logits_function(head)(hidden)
            assert found.dtype == torch.bfloat16 and torch.equal(found, head(hidden))


def test_the_module_owns_no_weights_of_its_own():
    head = linear(torch.ones(3, 2))
    owner = LMHeadLoss(head)
    assert owner.head is head and [*dict(owner.named_parameters())] == ["head.weight"]
    assert owner._z3_leaf  # DeepSpeed gathers the head for the whole task
