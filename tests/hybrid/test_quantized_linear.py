"""Quantized linear layers against bitsandbytes' own functions."""

import bitsandbytes.functional as bnb
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rwkvinside.errors import UserError
from rwkvinside.hybrid.quantized_linear import (
    FORMATS,
    QuantizedLinear,
    dequantized,
    flat_tensors,
    linear_names,
    quantize,
    read_flat,
    relative_error,
    restore,
)


def reference(weight, format, double, block=64):
    """The weight after bitsandbytes' quantization, put by hand: `block` values in a row share a scale."""
    if format == "int8":
        packed, scales, _ = bnb.int8_vectorwise_quant(weight)
        return bnb.int8_vectorwise_dequant(packed, scales)
    packed, state = bnb.quantize_4bit(weight, blocksize=block, compress_statistics=double, quant_type=format)
    scales = state.absmax
    if double:
        scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    indices = torch.cat([packed >> 4, packed & 15], 1).flatten()[: weight.numel()].long()
    return (bnb.get_4bit_type(format, "cpu")[indices] * scales.repeat_interleave(block)[: weight.numel()]).view_as(
        weight
    )


def small(bias=True):
    return nn.Sequential(nn.Linear(96, 66, bias=bias), nn.GELU(), nn.Linear(66, 33, bias=bias))


CASES = [(format, double, 64) for format in FORMATS for double in (True, False) if format != "int8" or double]
CASES += [("nf4", True, 32), ("fp4", False, 128)]


@pytest.mark.parametrize("format, double, block", CASES)
def test_product_and_gradient_are_those_of_the_unpacked_weight(format, double, block):
    model = small()
    wanted = [reference(model[i].weight.detach(), format, double, block) for i in (0, 2)]
    assert quantize(model, ["0", "2"], format, double, block) == ["0", "2"]
    assert all(torch.equal(model[i].weight, w) for i, w in zip((0, 2), wanted, strict=True))
    assert all(not p.requires_grad for p in (model[0].packed, model[2].packed))
    x, again = (torch.randn(5, 96).requires_grad_() for _ in range(2))
    again.data = x.detach().clone()
    model(x).square().sum().backward()
    plain = F.linear(F.gelu(F.linear(again, wanted[0], model[0].bias)), wanted[1], model[2].bias)
    plain.square().sum().backward()
    assert torch.equal(x.grad, again.grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model[0](x), F.linear(x, wanted[0]) + model[0].bias.bfloat16())


@pytest.mark.parametrize("rows, columns", [(128, 192), (64, 172), (33, 96), (7, 33)])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_rows_that_are_no_whole_blocks(format, rows, columns):
    model = nn.Sequential(nn.Linear(columns, rows))
    weight = model[0].weight.detach().clone()
    quantize(model, ["0"], format)
    assert torch.equal(model[0].weight, reference(weight, format, double=True))
    assert (model[0].weight - weight).norm() < 0.15 * weight.norm()
    if columns % 64 == 0:  # elsewhere bitsandbytes' own kernel for the CPU is wrong
        packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type=format)
        assert torch.equal(model[0].weight, bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("format, largest", [("nf4", 0.1), ("fp4", 0.13), ("int8", 0.01)])
def test_relative_error_is_that_of_the_weights(format, largest):
    model = small()
    original = [model[i].weight.detach().clone() for i in (0, 2)]
    quantize(model, ["0", "2"], format)
    found = relative_error([model[0], model[2]])
    difference = sum((model[i].weight - w).square().sum() for i, w in zip((0, 2), original, strict=True))
    assert found == pytest.approx((difference / sum(w.square().sum() for w in original)).sqrt().item(), rel=1e-4)
    assert 0 < found < largest


@pytest.mark.parametrize("format, double, block", CASES)
def test_conversions_of_the_model_do_not_touch_the_weight(format, double, block):
    model = small()
    quantize(model, ["0"], format, double, block)
    before = model[0].weight
    model.bfloat16()  # as DeepSpeed does
    assert torch.equal(model[0].weight, before)
    model.double()
    x = torch.randn(2, 96, dtype=torch.float64)
    assert torch.allclose(model[0](x), F.linear(x, before.double(), model[0].bias), atol=1e-12)


@pytest.mark.parametrize("format, double, block", CASES)
def test_stored_tensors_restore_the_layer_and_meta_knows_its_size(format, double, block):
    one, two = small(), small()
    quantize(one, ["0"], format, double, block)
    stored = flat_tensors({"0": one[0]})
    assert all(not t.is_floating_point() for t in stored.values())
    for name, parts in read_flat(stored).items():
        restore(two, name, *parts)
    assert torch.equal(one[0].weight, two[0].weight) and two[0].format == format
    with torch.device("meta"):
        shapes = small()
    quantize(shapes, ["0"], format, double, block)
    assert shapes[0].nbytes == one[0].nbytes and shapes[0].weight_numel == 96 * 66
    with pytest.raises(UserError, match=r"stored .* tensors of 2 do not fit it"):
        restore(two, "2", *read_flat(stored)["0"])


def test_dequantized_computes_the_same():
    model = small()
    quantize(model, ["0", "2"], "nf4")
    x = torch.randn(3, 96)
    before = model(x)
    model[0], model[2] = dequantized(model[0]), dequantized(model[2])
    assert type(model[0]) is nn.Linear and torch.equal(model(x), before)


def test_names_and_refusals():
    model = nn.ModuleDict({"mlp": small(), "lm_head": nn.Linear(4, 4), "embed": nn.Embedding(4, 4)})
    assert linear_names(model, skip=("lm_head",)) == ["mlp.0", "mlp.2"]
    with pytest.raises(UserError, match="embed is a Embedding"):
        quantize(model, ["embed"], "nf4")
    with pytest.raises(UserError, match="'nf3'"):
        quantize(model, ["mlp.0"], "nf3")
    quantize(model, ["mlp.0"], "nf4")
    with pytest.raises(UserError, match="mlp.0 is a QuantizedLinear"):
        quantize(model, ["mlp.0"], "nf4")


def test_checkpointed_and_double_backward_free_use():
    from torch.utils.checkpoint import checkpoint

    model = small()
    quantize(model, ["0", "2"], "nf4")
    gradients = []
    for recompute in (False, True):
        x = torch.ones(2, 96, requires_grad=True)
        y = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
        gradients.append(torch.autograd.grad(y.square().sum(), x)[0])
    assert torch.equal(*gradients)
    assert isinstance(model[0], QuantizedLinear)
