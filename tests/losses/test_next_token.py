"""Cross-entropy alone against torch's own over all logits at once."""

import pytest
import torch
import torch.nn.functional as F
from head_problem import gradients, problem

from rwkvinside.data.batch import Targets
from rwkvinside.hybrid.lm_head import LMHeadLoss
from rwkvinside.losses.next_token import NextTokenLoss


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_cross_entropy_alone(dtype, tolerance):
    hidden, head, labels, *_ = problem(dtype)
    hidden.requires_grad_()
    expected = F.cross_entropy(head(hidden)[0], labels[0], reduction="sum")
    for size in (None, 1, 7, 1000):
        loss, sums = LMHeadLoss(head)(hidden, Targets.of(labels), NextTokenLoss(size))
        assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
        assert sums == {"ce": loss.detach()} and not sums["ce"].requires_grad
        want = torch.autograd.grad(expected, [hidden, head.weight], retain_graph=True)
        for got, exact in zip(gradients(loss, hidden, head), want, strict=True):
            assert (got - exact).norm() <= tolerance * exact.norm()
