"""4-bit weights chosen for a layer's inputs: what they hold, and that the layer's output gains."""

import pytest
import torch
from torch import nn

from rwkvinside.quantization import QuantizedLinear, codebook, pack
from rwkvinside.rounding import round_to_inputs


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
    chosen = linear(round_to_inputs(weight, x.T @ x, format, double, block), *shape, format, block)
    assert {n: (t.shape, t.dtype) for n, t in chosen.tensors().items()} == {
        n: (t.shape, t.dtype) for n, t in nearest.tensors().items()
    }
    target = held_out @ weight.T
    error = [float((layer(held_out) - target).square().mean()) for layer in (nearest, chosen)]
    assert error[1] < 0.75 * error[0]


def test_without_correlations_every_weight_is_a_nearest_value():
    torch.manual_seed(0)
    weight = torch.randn(8, 64)
    layer = linear(round_to_inputs(weight, torch.eye(64), "nf4", False, 64), 8, 64, "nf4")
    values = layer.scales.view(torch.float32)[:, None, None] * codebook("nf4", torch.device("cpu"))
    best = (values - weight[:, :, None]).abs().amin(-1)
    torch.testing.assert_close((layer.unpack() - weight).abs(), best, rtol=0, atol=1e-6)


def test_inputs_that_are_always_zero():
    """A layer that no calibration token reaches (an expert, a dead channel) still gets sensible weights."""
    torch.manual_seed(0)
    weight = torch.randn(8, 64)
    layer = linear(round_to_inputs(weight, torch.zeros(64, 64), "nf4", True, 64), 8, 64, "nf4")
    assert float((layer.unpack() - weight).norm() / weight.norm()) < 0.15
    zero = linear(round_to_inputs(torch.zeros(8, 64), torch.eye(64), "nf4", True, 64), 8, 64, "nf4")
    assert not zero.unpack().any()
    assert isinstance(zero, nn.Linear)
