"""The error of a layer in PyTorch code; its Triton kernels: tests/kernels/squared_error_cases.py."""

import math

import pytest
import torch

from rwkvinside.hybrid.layer_error import squared_error, squares

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("output", DTYPES, ids=str)
def test_what_is_behind_the_mask_counts_nothing(output, target):
    """Not even NaN does, in the gradient neither; float64 stays float64."""
    torch.manual_seed(0)
    x, y, mask = torch.randn(2, 7, 24).to(output), torch.randn(2, 7, 24).to(target), torch.rand(2, 7) < 0.6
    difference = (x.double() - y.double())[mask]
    x[~mask], y[~mask] = math.nan, math.inf
    error = squared_error(x.requires_grad_(), y, mask, "auto")
    double = torch.float64 in (output, target)
    assert error.shape == () and error.dtype == (torch.float64 if double else torch.float32)
    assert error.item() == pytest.approx(difference.square().sum().item(), rel=1e-14 if double else 1e-6)
    (grad,) = torch.autograd.grad(error, x)
    assert not grad[~mask].any() and grad.dtype == output
    bound = {torch.float64: 1e-14, torch.float32: 2e-7, torch.bfloat16: 2**-8}[output]
    assert (grad[mask] - 2 * difference).norm() <= bound * (2 * difference).norm()
    norm = squares(y, mask)
    assert norm.item() == pytest.approx(y[mask].double().square().sum().item(), rel=1e-6)
    assert norm.dtype == (torch.float64 if target == torch.float64 else torch.float32)
