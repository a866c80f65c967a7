"""Properties of the Triton kernel that exports carry. Not collected by name: test_wkv7_triton.py runs this file in a
separate process, because Triton decides between interpreter and GPU when a kernel's module is imported."""

import pytest
import torch
import triton

from rwkvinside.modeling import wkv7 as door
from rwkvinside.modeling.wkv7 import wkv7, wkv7_reference
from rwkvinside.modeling.wkv7_triton import recur

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"


def inputs(B, T, H, N, G=None, dtype=torch.float32, seed=0, decay=0.60653066):
    """(r, w, k, v, a, b) each (B, T, H or G, N) as an RWKV-7 mixer makes them, and a state; the log decay is fp32."""
    random = torch.Generator().manual_seed(seed)
    G = G or H

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=random)

    kk = torch.nn.functional.normalize(normal(B, T, G, N), dim=-1)
    w = -decay * normal(B, T, H, N).sigmoid()
    values = [normal(B, T, H, N), w, normal(B, T, G, N), normal(B, T, G, N), -kk, kk * normal(B, T, G, N).sigmoid()]
    values = [x.to(DEVICE, torch.float32 if i == 1 else dtype) for i, x in enumerate(values)]
    return values, normal(B, H, N, N).to(DEVICE, torch.float32)


def reference(values, state):
    """y and the final state in float64, heads that are shared repeated."""
    H = values[0].shape[2]
    return wkv7_reference(
        *(x.double().cpu().repeat_interleave(H // x.shape[2], 2) for x in values), state.double().cpu()
    )


def error(value, expected):
    return float((value.double().cpu() - expected).norm() / expected.norm())


@pytest.mark.parametrize("N", [8, 16, 40, 64, 128, 256])
@pytest.mark.parametrize("T", [1, 2, 11])
def test_decode_and_prefill_from_a_state(N, T):
    values, state = inputs(2, T, 2, N)
    before = state.clone()
    y, final = recur(*values, state)
    expected_y, expected_final = reference(values, state)
    assert y.shape == expected_y.shape and final.dtype == torch.float32
    assert error(y, expected_y) < 1e-6
    assert error(final, expected_final) < 1e-6
    assert torch.equal(state, before), "not in place"


@pytest.mark.parametrize("G", [1, 2])
def test_shared_heads(G):
    """Every head has its own decay and receptance, so that a wrong head shows."""
    values, state = inputs(2, 5, 4, 32, G=G)
    y, final = recur(*values, state)
    expected_y, expected_final = reference(values, state)
    assert error(y, expected_y) < 1e-6 and error(final, expected_final) < 1e-6


def test_a_start_from_nothing_is_a_start_from_zero():
    values, state = inputs(1, 6, 2, 16)
    y, final = recur(*values)
    expected_y, expected_final = reference(values, torch.zeros_like(state))
    assert error(y, expected_y) < 1e-6 and error(final, expected_final) < 1e-6


def test_rows_of_different_lengths_and_garbage_behind_the_mask():
    """Left and right padding, holes, a row without tokens; y is 0 and the state untouched whatever is there."""
    values, state = inputs(5, 7, 2, 24)
    mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [0, 1, 0, 1, 0, 0, 1], [0] * 7]).bool()
    expected = [reference([x[i : i + 1, mask[i]] for x in values], state[i : i + 1]) for i in range(4)]
    for x in values:
        x[~mask.to(DEVICE)] = float("nan")
    y, final = recur(*values, state, mask=mask.to(DEVICE))
    assert torch.equal(final[4], state[4])
    assert not y[~mask.to(DEVICE)].any()
    for i, (expected_y, expected_final) in enumerate(expected):
        assert error(y[i : i + 1, mask[i]], expected_y) < 1e-6
        assert error(final[i : i + 1], expected_final) < 1e-6


def test_in_pieces_it_is_the_same_bit_for_bit():
    values, state = inputs(2, 13, 2, 40)
    mask = torch.rand(2, 13, generator=torch.Generator().manual_seed(1)).to(DEVICE) > 0.3
    y, final = recur(*values, state, mask=mask)
    parts = []
    for piece in (slice(0, 6), slice(6, 7), slice(7, 8), slice(8, 13)):
        part, state = recur(*(x[:, piece] for x in values), state, mask=mask[:, piece])
        parts.append(part)
    assert torch.equal(torch.cat(parts, 1), y) and torch.equal(state, final)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_lose_nothing_but_the_rounding_of_y(dtype):
    values, state = inputs(2, 9, 2, 64, dtype=dtype)
    y, final = recur(*values, state)
    expected_y, expected_final = reference(values, state)
    assert y.dtype == dtype and final.dtype == torch.float32
    assert error(y, expected_y) < 5e-3  # the interpreter truncates where a GPU rounds
    assert error(final, expected_final) < 1e-6


@pytest.mark.parametrize("decay", [0.0, 5.0, 60.0])
def test_any_decay(decay):
    """60: the chunked path refuses it, and exp of it is nearly 0."""
    values, state = inputs(1, 8, 2, 16, decay=decay)
    y, final = recur(*values, state)
    expected_y, expected_final = reference(values, state)
    assert error(y, expected_y) < 1e-6 and error(final, expected_final) < 1e-6


def test_in_place_and_strides():
    values, state = inputs(2, 4, 3, 16)
    expected_y, expected_final = reference(values, state)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in values]
    heads_first[4] = torch.stack([heads_first[4]] * 2, -1)[..., 0]  # columns apart
    y, final = recur(*heads_first, state, inplace=True)
    assert final.data_ptr() == state.data_ptr()
    assert error(y, expected_y) < 1e-6 and error(final, expected_final) < 1e-6


def test_heads_that_lie_further_apart_than_32_bits_count():
    """As those of a very long text do where heads come before tokens; memory that is not written to takes none."""
    values, state = inputs(1, 3, 3, 16, dtype=torch.bfloat16)
    wanted = recur(*values, state)
    apart = torch.empty(2**31 + 48, dtype=torch.bfloat16, device=DEVICE).as_strided((1, 3, 3, 16), (48, 16, 2**30, 1))
    found = recur(apart.copy_(values[0]), *values[1:], state)
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def test_a_bf16_state_is_converted_and_kept():
    values, state = inputs(1, 2, 2, 16)
    low = state.bfloat16()
    y, final = recur(*values, low, inplace=True)
    assert final.dtype == torch.float32
    assert error(final, reference(values, low)[1]) < 1e-6


def test_nothing_to_do():
    values, state = inputs(2, 0, 2, 16)
    y, final = recur(*values, state)
    assert y.shape == (2, 0, 2, 16) and torch.equal(final, state)
    values, state = inputs(0, 3, 2, 16)
    y, final = recur(*values, state)
    assert y.shape == (0, 3, 2, 16) and final.shape == (0, 2, 16, 16)


def test_without_the_package_it_is_what_triton_means(monkeypatch):
    monkeypatch.setattr(door, "kernels", None)
    values, state = inputs(2, 5, 2, 16)
    mask = torch.ones(2, 5, device=DEVICE).long()  # not bool, as the door takes it
    mask[0, 0] = 0
    y, final = wkv7(*values, state, mask=mask, backend="triton")
    expected_y, expected_final = recur(*values, state, mask=mask.bool())
    assert torch.equal(y, expected_y) and torch.equal(final, expected_final)
    assert not y.requires_grad


def test_without_the_package_it_is_no_way_to_train_or_to_pack(monkeypatch):
    monkeypatch.setattr(door, "kernels", None)
    values, state = inputs(1, 5, 2, 16)
    with pytest.raises(RuntimeError, match="not installed.* takes no packed documents"):
        wkv7(*values, state, cu_seqlens=torch.tensor([0, 5], device=DEVICE), backend="triton")
    with pytest.raises(RuntimeError, match="float64"):
        wkv7(*(x.double() for x in values), state.double(), backend="triton")
    state.requires_grad_()
    with pytest.raises(RuntimeError, match="not installed.* computes no gradients"):
        wkv7(*values, state, backend="triton")
    with torch.no_grad():
        wkv7(*values, state, backend="triton")
