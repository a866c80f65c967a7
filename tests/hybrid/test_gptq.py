"""4-bit weights chosen for a layer's inputs: what they hold, and that the layer's output gains."""

import pytest
import torch
from torch import nn

from rwkvinside.hybrid.gptq import STRENGTHS, gptq_pack, refit
from rwkvinside.hybrid.quantized_linear import QuantizedLinear, codebook, pack


def linear(tensors, out_features, in_features, format, block=64):
    return QuantizedLinear(in_features, out_features, None, format, tensors, block)


def inputs(count, width, seed=0):
    """Correlated, with a few loud channels, as hidden states are."""
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(99)) / width**0.5 + torch.eye(width)
    loud = torch.ones(width)
    loud[:: max(1, width // 7)] = 6
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) @ mixing * loud


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("shape", [(48, 172), (31, 33), (16, 300)])  # blocks across rows, an odd count, several passes
def test_output_is_closer_than_with_nearest_values(format, double, shape, block):
    torch.manual_seed(0)
    weight, x = torch.randn(shape), inputs(1000, shape[1])
    held_out = inputs(500, shape[1], seed=1)
    nearest = linear(pack(weight, format, double, block), *shape, format, block)
    chosen = linear(gptq_pack(weight, x.T @ x, format, double, block), *shape, format, block)
    assert {n: (t.shape, t.dtype) for n, t in chosen.tensors().items()} == {
        n: (t.shape, t.dtype) for n, t in nearest.tensors().items()
    }
    target = held_out @ weight.T
    error = [float((layer(held_out) - target).square().mean()) for layer in (nearest, chosen)]
    assert error[1] < 0.75 * error[0]


def test_without_correlations_every_weight_is_a_nearest_value():
    torch.manual_seed(0)
    weight = torch.randn(8, 64)
    layer = linear(gptq_pack(weight, torch.eye(64), "nf4", False, 64), 8, 64, "nf4")
    values = layer.scales.view(torch.float32)[:, None, None] * codebook("nf4", torch.device("cpu"))
    best = (values - weight[:, :, None]).abs().amin(-1)
    torch.testing.assert_close((layer.unpack() - weight).abs(), best, rtol=0, atol=1e-6)


def test_inputs_that_are_always_zero():
    """A layer that no calibration token reaches (an expert, a dead channel) still gets sensible weights."""
    torch.manual_seed(0)
    weight = torch.randn(8, 64)
    layer = linear(gptq_pack(weight, torch.zeros(64, 64), "nf4", True, 64), 8, 64, "nf4")
    assert float((layer.unpack() - weight).norm() / weight.norm()) < 0.15
    zero = linear(gptq_pack(torch.zeros(8, 64), torch.eye(64), "nf4", True, 64), 8, 64, "nf4")
    assert not zero.unpack().any()
    assert isinstance(zero, nn.Linear)


def test_refit_finds_the_weight_that_was_wanted():
    torch.manual_seed(0)
    weight, x = torch.randn(12, 40), inputs(2000, 40)
    other = weight + 0.1 * torch.randn(12, 40)
    found = refit(weight, x, x @ other.T + 0.01 * torch.randn(2000, 12))
    held_out = inputs(500, 40, seed=1)
    error = [float(((w - other) @ held_out.T).square().mean()) for w in (weight, found)]
    assert error[1] < 0.01 * error[0]


def test_refit_is_the_ridge_regression_of_one_of_its_strengths():
    torch.manual_seed(0)
    weight, x = torch.randn(3, 10).double(), inputs(60, 10).double()
    wanted = x @ (weight + 0.1 * torch.randn(3, 10)).T + torch.randn(60, 3)
    found = refit(weight, x, wanted)
    solutions = []
    for strength in STRENGTHS:  # least squares, with rows that say: stay
        rows = (strength * x.square().sum(0).mean()).sqrt() * torch.eye(10).double()
        target = torch.cat([wanted - x @ weight.T, torch.zeros(10, 3).double()])
        solutions.append(weight + torch.linalg.lstsq(torch.cat([x, rows]), target).solution.T)
    assert min(float((found - solution).abs().max()) for solution in solutions) < 1e-12
    assert float((found - weight).norm()) > 0.01


def test_refit_leaves_a_weight_that_the_tokens_say_nothing_about():
    torch.manual_seed(0)
    weight = torch.randn(8, 64)
    for x in (inputs(30, 64), torch.zeros(30, 64), inputs(1, 64)):
        assert torch.equal(refit(weight, x, x @ weight.T + torch.randn(len(x), 8)), weight)
