"""Properties of the Triton decode step. Not collected by name: test_decode.py runs this file in a separate process,
because Triton decides between interpreter and GPU when a kernel's module is imported."""

import pytest
import torch
import triton

from rwkvinside.kernels.gpu.decode import step
from rwkvinside.modeling.wkv7 import wkv7_reference

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"


def inputs(B, H, N, T=1, G=None, seed=0):
    """(r, w, k, v, a, b) each (B, T, H or G, N) as an RWKV-7 mixer makes them, and a state, all float64 on the CPU."""
    random = torch.Generator().manual_seed(seed)
    G = G or H

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=random)

    kk = torch.nn.functional.normalize(normal(B, T, G, N), dim=-1)
    w = -(0.60653066 * normal(B, T, H, N).sigmoid())
    values = (normal(B, T, H, N), w, normal(B, T, G, N), normal(B, T, G, N), -kk, kk * normal(B, T, G, N).sigmoid())
    return values, normal(B, H, N, N)


def on_device(values, dtype=torch.float32):
    """Rounded to what the kernel reads; the log decay stays fp32."""
    return [x.to(DEVICE, torch.float32 if i == 1 else dtype) for i, x in enumerate(values)]


def reference(values, state):
    """y and the final state in float64, heads that are shared repeated."""
    H = values[0].shape[2]
    values = [x.double().cpu().repeat_interleave(H // x.shape[2], 2) for x in values]
    return wkv7_reference(*values, state.double().cpu())


def decode(values, state, mask=None):
    """Token by token; returns y (B, T, H, N) and leaves the final state in `state`."""
    masks = [None] * values[0].shape[1] if mask is None else mask.unbind(1)
    steps = zip(*(x.unbind(1) for x in values), masks, strict=True)
    return torch.stack([step(*token, state, kept) for *token, kept in steps], 1)


def error(value, expected):
    return float((value.double().cpu() - expected).norm() / expected.norm())


@pytest.mark.parametrize("N", [8, 16, 40, 64, 128, 256])
def test_sixteen_steps_are_a_prefill_of_sixteen(N):
    T = 16 if N <= 64 else 4
    values, state = inputs(2, 3, N, T)
    values, state = on_device(values), state.to(DEVICE, torch.float32)
    expected_y, expected_state = reference(values, state)
    y = decode(values, state)
    assert error(y, expected_y) < 1e-6
    assert error(state, expected_state) < 1e-6


@pytest.mark.parametrize("G", [1, 2])
def test_shared_heads(G):
    """Every head has its own decay and receptance, so that a wrong head shows."""
    values, state = inputs(2, 4, 32, T=2, G=G)
    values, state = on_device(values), state.to(DEVICE, torch.float32)
    expected_y, expected_state = reference(values, state)
    assert error(decode(values, state), expected_y) < 1e-6
    assert error(state, expected_state) < 1e-6


def test_a_masked_row_keeps_its_state_bit_for_bit_whatever_its_inputs():
    values, state = inputs(3, 2, 24, T=3)
    values, state = on_device(values), state.to(DEVICE, torch.float32)
    mask = torch.tensor([[True, True, True], [False, True, True], [False, False, False]], device=DEVICE)
    before = state.clone()
    expected = [reference([x[:1] for x in values], before[:1]), reference([x[1:2, 1:] for x in values], before[1:2])]
    for x in values:
        x[~mask] = float("nan")
    y = decode(values, state, mask)
    assert torch.equal(state[2], before[2])
    assert torch.equal(y[~mask], torch.zeros_like(y[~mask]))
    assert error(y[:1], expected[0][0]) < 1e-6 and error(y[1:2, 1:], expected[1][0]) < 1e-6
    assert error(state[:1], expected[0][1]) < 1e-6 and error(state[1:2], expected[1][1]) < 1e-6


def test_strided_inputs_and_a_state_inside_a_larger_buffer():
    values, state = inputs(2, 3, 16)
    values = [x[:, 0] for x in on_device(values)]
    buffer = torch.full((4, 3, 20, 32), 7.0, device=DEVICE)
    view = buffer[1:3, :, 2:18, 8:24]
    view.copy_(state)
    expected_y, expected_state = reference([x.unsqueeze(1) for x in values], view)
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in values]
    columns_apart = torch.stack([heads_first[4]] * 2, -1)[..., 0]
    y = step(*heads_first[:4], columns_apart, heads_first[5], view)
    assert error(y.unsqueeze(1), expected_y) < 1e-6
    assert error(view, expected_state) < 1e-6
    view.fill_(7.0)
    assert torch.equal(buffer, torch.full_like(buffer, 7.0))


def test_bf16_inputs_lose_nothing_but_the_rounding_of_y():
    values, state = inputs(2, 2, 64, T=3)
    values, state = on_device(values, torch.bfloat16), state.to(DEVICE, torch.float32)
    expected_y, expected_state = reference(values, state)
    y = decode(values, state)
    assert y.dtype == torch.bfloat16
    assert error(y, expected_y) < 5e-3  # the interpreter truncates where a GPU rounds
    assert error(state, expected_state) < 1e-6


def test_an_empty_batch():
    values, state = inputs(0, 2, 16)
    y = step(*(x[:, 0] for x in on_device(values)), state.to(DEVICE, torch.float32))
    assert y.shape == (0, 2, 16)


def test_the_op_is_registered_as_torch_wants_it():
    values, state = inputs(1, 2, 16)
    arguments = (*(x[:, 0] for x in on_device(values)), state.to(DEVICE, torch.float32))
    torch.library.opcheck(step, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_large_offsets_and_a_captured_graph():
    """More than 2^31 elements of state, and replay of a CUDA graph, as decoding does it."""
    B, H, N = 512, 68, 256
    values, _ = inputs(1, H, N)
    values = [x[:, 0].expand(B, -1, -1) for x in on_device(values)]
    state = torch.zeros(B, H, N, N, device=DEVICE)
    expected = step(*values, state.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step(*values, state)
    graph.replay()
    assert torch.equal(y, expected)
    assert torch.equal(state[-1], state[0]) and state[0].any()
