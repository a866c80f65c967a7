"""Properties of the Triton training kernels, in the interpreter or on a GPU. Run by test_triton.py, or directly:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/triton_cases.py

The measure is the relative L2 distance to the reference in float64 on the very inputs that the kernels got.
"""

import gc
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.utils.checkpoint import checkpoint

from rwkvinside.kernels.gpu import kernels, op, wkv7
from rwkvinside.kernels.gpu.launch import capability
from rwkvinside.kernels.gpu.table import lookup
from rwkvinside.modeling.wkv7 import wkv7_reference

INTERPRETED = kernels.INTERPRETED.value
DEVICE = "cpu" if INTERPRETED else "cuda"
CLOSE = 1e-6 if INTERPRETED else 3e-6  # a GPU's exp2 and order of summation cost a little
NAMES = ("y", "final", "dr", "dw", "dk", "dv", "da", "db", "dstate")
on_a_gpu = pytest.mark.skipif(INTERPRETED, reason="says something about compiled kernels only")


@pytest.fixture(autouse=True)
def no_bf16_products(monkeypatch):
    """The interpreter multiplies the bit patterns of bf16 operands: no kernel may give it any."""
    if not INTERPRETED:
        return
    from triton.runtime.interpreter import InterpreterBuilder

    multiply = InterpreterBuilder.create_dot

    def guarded(self, x, y, *rest):
        assert x.dtype.scalar.is_fp32() and y.dtype.scalar.is_fp32(), "a product of operands that are not fp32"
        return multiply(self, x, y, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", guarded)


@triton.jit
def _round(x_, y_, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(y_ + i, kernels._round_to_bf16(tl.load(x_ + i)))


def test_rounding_by_integers_is_rounding_to_nearest_even():
    x = torch.cat(
        [torch.randn(1022) * 10.0 ** torch.randint(-30, 30, (1022,)), torch.tensor([1 + 2**-8, 1 + 3 * 2**-8])]
    )
    x = x.to(DEVICE)
    y = torch.empty_like(x)
    _round[(1,)](x, y, 1024)
    assert torch.equal(y, x.bfloat16().float())


def inputs(B=1, T=33, H=2, N=16, decay=None, keys="random", dtype=torch.float32, seed=0, sequences=None, groups=None):
    """(r, w, k, v, a, b, state) as the RWKV-7 mixer makes them, gates differing between heads; `decay` pins them,
    keys="one" repeats a single key, `groups` gives heads that share k, v, a, b."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    G = groups or H
    gates = torch.sigmoid(normal(B, T, H, N) + torch.linspace(-3, 1, H)[:, None])
    w = -0.6065 * gates if decay is None else torch.full((B, T, H, N), float(decay), dtype=torch.float64)
    direction = F.normalize(normal(B, 1, G, N).expand(B, T, G, N) if keys == "one" else normal(B, T, G, N), dim=-1)
    rate = torch.full((B, T, G, N), 0.99, dtype=torch.float64) if keys == "one" else torch.sigmoid(normal(B, T, G, N))
    k = direction if keys == "one" else normal(B, T, G, N)
    state = normal(sequences or B, H, N, N)
    r, k, v, a, b = (x.to(dtype) for x in (normal(B, T, H, N), k, normal(B, T, G, N), -direction, direction * rate))
    return [x.to(DEVICE) for x in (r, w.float(), k, v, a, b, state.float())]


def cotangents(r, v, state, seed=1):
    generator = torch.Generator().manual_seed(seed)
    dy = torch.randn(r.shape, generator=generator).to(v.dtype).to(DEVICE)
    return dy, torch.randn(state.shape, generator=generator).to(DEVICE)


def results(function, args, dy, dfinal):
    """y, the final state and all gradients."""
    leaves = [x.detach().requires_grad_() for x in args]
    y, final = function(*leaves)
    return [y.detach(), final.detach(), *torch.autograd.grad((y, final), leaves, (dy.to(y), dfinal.to(final)))]


def expected(args, dy, dfinal, mask=None, cu_seqlens=None):
    def reference(r, w, k, v, a, b, state):
        k, v, a, b = (x.repeat_interleave(r.shape[2] // x.shape[2], 2) for x in (k, v, a, b))
        if mask is not None:
            w, k, v, a, b = (x.masked_fill(~mask[:, :, None, None], 0) for x in (w, k, v, a, b))
        y, final = wkv7_reference(r, w, k, v, a, b, state, cu_seqlens)
        return (y if mask is None else y.masked_fill(~mask[:, :, None, None], 0)), final

    return results(reference, [x.double() for x in args], dy, dfinal)


def distances(found, wanted):
    return {
        name: ((x.double() - y).norm() / y.norm().clamp(min=1e-30)).item()
        for name, x, y in zip(NAMES, found, wanted, strict=True)
    }


def assert_close(found, wanted, limit, **limits):
    """Every distance is at most `limit`, or what `limits` says by name."""
    measured = distances(found, wanted)
    too_far = {name: x for name, x in measured.items() if not x <= limits.get(name, limit)}
    assert not too_far, f"too far: {too_far}; all: {measured}"


def planned(args, dy, dfinal, precision="fp32", segments=1, block_v=None, **changes):
    """Results straight from the plans, with a configuration changed as given."""
    *tensors, state = args
    found = capability(tensors[0].device)
    padded = max(16, 1 << (tensors[0].shape[3] - 1).bit_length())
    config = replace(lookup(padded, found, precision), **changes)
    options = {
        "precision": precision, "capability": found, "config": config, "segments": segments, "block_v": block_v,
    }  # fmt: skip
    launches, (y, final, starts, u) = op.plan_forward(*tensors, state, **options)
    for launch in launches:
        launch.run()
    launches, grads = op.plan_backward(*tensors, None, None, starts, u, dy, dfinal, **options)
    for launch in launches:
        launch.run()
    return [y, final, *grads]


@pytest.mark.parametrize(
    "N, T",
    [(16, T) for T in (1, 2, 15, 16, 17, 31, 32, 33, 65)] + [(8, 17), (40, 33), (64, 33), (128, 17), (192, 17)],
)
def test_every_length_and_head_size(N, T):
    args = inputs(T=T, N=N, H=2 if N < 64 else 1)
    dy, dfinal = cotangents(args[0], args[3], args[6])
    assert_close(results(wkv7, args, dy, dfinal), expected(args, dy, dfinal), CLOSE)


@pytest.mark.parametrize("changes", [{"length": 16, "block_v": 32}, {"length": 32}, {"length": 32, "grad_block_k": 16}])
def test_chunk_lengths_and_blocks(changes):
    args = inputs(T=40, N=32, H=1)
    dy, dfinal = cotangents(args[0], args[3], args[6])
    assert_close(planned(args, dy, dfinal, **changes), expected(args, dy, dfinal), CLOSE)


def test_no_initial_state_and_batch():
    args = inputs(B=2, T=20)
    dy, dfinal = cotangents(args[0], args[3], args[6])
    args[6] = torch.zeros_like(args[6])
    wanted = expected(args, dy, dfinal)
    found = results(lambda *x: wkv7(*x), args[:6], dy, dfinal)
    assert_close([*found, wanted[8]], wanted, CLOSE)


def test_masked_steps_are_the_identity():
    args = inputs(B=2, T=40)
    mask = torch.ones(2, 40, dtype=torch.bool, device=DEVICE)
    mask[0, :5] = mask[0, 12:20] = mask[1, 30:] = False  # left, middle, right
    dy, dfinal = cotangents(args[0], args[3], args[6])
    wanted = expected(args, dy, dfinal, mask=mask)
    for x in args[:6]:
        x[~mask] = float("nan")  # what is there is not read
    found = results(lambda *x: wkv7(*x, mask=mask), args, dy, dfinal)
    assert_close(found, wanted, CLOSE)
    for x in (found[0], *found[2:8]):
        assert not x[~mask].any()


@pytest.mark.parametrize("groups", [None, 1])
def test_packed_sequences(groups):
    bounds = [0, 0, 1, 18, 18, 50, 50]
    args = inputs(T=55, sequences=6, groups=groups)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    dy, dfinal = cotangents(args[0], args[3], args[6])
    inner = [x[:, :50] for x in args[:6]]
    wanted = expected([*inner, args[6]], dy[:, :50], dfinal, cu_seqlens=cu_seqlens)
    found = results(lambda *x: wkv7(*x, cu_seqlens=cu_seqlens), args, dy, dfinal)
    per_token = (0, 2, 3, 4, 5, 6, 7)
    assert not any(found[i][:, 50:].any() for i in per_token), "tokens of no sequence"
    for i in per_token:
        found[i] = found[i][:, :50]
    assert_close(found, wanted, CLOSE)


def test_layers_share_the_table_of_chunks(monkeypatch):
    located = []

    def locate(cu_seqlens, chunks, length):
        located.append(cu_seqlens.tolist())
        return found_chunks(cu_seqlens, chunks, length)

    found_chunks = op._locate_chunks
    monkeypatch.setattr(op, "_locate_chunks", locate)
    args = inputs(T=40, sequences=2)
    dy, dfinal = cotangents(args[0], args[3], args[6])
    cu_seqlens = torch.tensor([0, 19, 40], device=DEVICE)
    for _ in range(2):
        results(lambda *x: wkv7(*x, cu_seqlens=cu_seqlens), args, dy, dfinal)
    assert located == [[0, 19, 40]]  # of two layers, forward and backward
    cu_seqlens[1] = 7
    found = results(lambda *x: wkv7(*x, cu_seqlens=cu_seqlens), args, dy, dfinal)
    assert located[1:] == [[0, 7, 40]]
    assert_close(found, expected(args, dy, dfinal, cu_seqlens=cu_seqlens), CLOSE)
    alive = len(op._chunk_tables)
    cu_seqlens = None
    gc.collect()
    assert len(op._chunk_tables) == alive - 1


def test_packed_sequences_with_a_mask():
    args = inputs(T=40, sequences=2)
    cu_seqlens = torch.tensor([0, 19, 40], device=DEVICE)
    mask = torch.ones(1, 40, dtype=torch.bool, device=DEVICE)
    mask[:, 15:22] = False
    dy, dfinal = cotangents(args[0], args[3], args[6])
    found = results(lambda *x: wkv7(*x, mask=mask, cu_seqlens=cu_seqlens), args, dy, dfinal)
    assert_close(found, expected(args, dy, dfinal, mask, cu_seqlens), CLOSE)


@pytest.mark.parametrize("shared", ["kv", "ab", "kvab"])
def test_heads_that_share_inputs(shared):
    args = inputs(T=20, H=4)
    few = inputs(T=20, H=4, groups=2)
    for place, name in enumerate("rwkvab"):
        if name in shared:
            args[place] = few[place]
    dy, dfinal = cotangents(args[0], args[3], args[6])
    found = results(wkv7, args, dy, dfinal)
    assert [x.shape for x in found[2:]] == [x.shape for x in args]
    assert_close(found, expected(args, dy, dfinal), CLOSE)


@pytest.mark.parametrize("precision", ["fp32", "high", "balanced"])
def test_heads_that_share_inputs_in_bf16(precision):
    args = inputs(T=20, H=4, groups=1, dtype=torch.bfloat16)
    dy, dfinal = cotangents(args[0], args[3], args[6])
    found = results(lambda *x: wkv7(*x, precision=precision), args, dy, dfinal)
    assert [(x.shape, x.dtype) for x in found[2:]] == [(x.shape, x.dtype) for x in args]
    assert_close(found, expected(args, dy, dfinal), **MODES["balanced"][0])


@pytest.mark.parametrize("N", [8, 24, 64, 128, 256])
@pytest.mark.parametrize("R", [1, 2, 3, 8])
@pytest.mark.parametrize("precision, dtype", [("fp32", "float32"), ("high", "bfloat16"), ("balanced", "bfloat16")])
def test_sums_over_heads_are_in_fp32_and_rounded_once(precision, dtype, R, N):
    dtype, kept = getattr(torch, dtype), torch.bfloat16 if precision == "balanced" else torch.float32
    r, *others, _ = inputs(B=2, T=50, H=3 * R, groups=3, N=N, dtype=dtype)
    plan = op._Plan((r, *others), None, None, precision, capability(r.device), None, None)
    buffers, grads, sums = plan.gradients("v")
    (grad,) = buffers.values()
    if R == 1:
        assert not sums and grad is grads[3]
        return
    assert grad.dtype == kept and grads[3].dtype == dtype and grads[3].shape == (2, 50, 3, N)
    (launch,) = sums
    assert launch.args["sums_"] is grads[3]
    grad.copy_(torch.randn(grad.shape))
    out = launch.args["sums_"] = torch.full((grads[3].numel() + 4096,), float("nan"), dtype=dtype, device=DEVICE)
    launch.run()
    found, beyond = out.split([grads[3].numel(), 4096])
    heads = grad.view(2, 50, 3, R, N)
    wanted, most = heads.float().sum(3).flatten(), heads.double().abs().sum(3).flatten()
    assert beyond.isnan().all()
    if R == 2:
        assert torch.equal(found, wanted.to(dtype))
    rounded = 2**-8 * wanted.abs() if dtype == torch.bfloat16 else 0.0
    assert ((found.double() - wanted).abs() <= 1e-6 * most + rounded).all()


def test_a_batch_of_no_rows():
    args = inputs(B=0, T=20, groups=1)
    found = results(wkv7, args, *cotangents(args[0], args[3], args[6]))
    assert [x.shape for x in found[2:]] == [x.shape for x in args]


def test_strided_inputs():
    args = inputs(B=2, T=20)
    dy, dfinal = cotangents(args[0], args[3], args[6])
    wanted = results(wkv7, args, dy, dfinal)
    fused = torch.stack(args[:3], 2)  # (B, T, 3, H, N), as one projection gives it
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in args[3:5]]
    columns_first = args[5].transpose(1, 3).contiguous().transpose(1, 3)
    state = args[6].mT.contiguous().mT
    found = results(wkv7, [*fused.unbind(2), *heads_first, columns_first, state], dy.expand(2, 20, 2, 16), dfinal)
    for x, y in zip(found, wanted, strict=True):
        assert torch.equal(x, y)


def test_repeated_keys():
    args = inputs(T=70, H=1, decay=-1e-4, keys="one")
    dy, dfinal = cotangents(args[0], args[3], args[6])
    assert_close(planned(args, dy, dfinal, length=32), expected(args, dy, dfinal), 2e-5)


@pytest.mark.parametrize(
    "decay, limits",
    [(0.0, {}), (-1e-6, {}), (-0.6065, {}), (-5.0, {"dw": 5e-5 if INTERPRETED else 2e-4})],
)
def test_pinned_decays(decay, limits):
    """The gradient of a decay of e^-5 is what is left of pairs of order 1 that cancel: fp32 has no more of it."""
    args = inputs(T=64, H=1, N=32, decay=decay)
    dy, dfinal = cotangents(args[0], args[3], args[6])
    assert_close(planned(args, dy, dfinal, length=32), expected(args, dy, dfinal), CLOSE, **limits)


# Up to twice what these cases give in the interpreter, which rounds operands as a GPU does
MODES = {
    "high": ({"limit": 4e-3, "dr": 3e-3, "dk": 3e-3, "da": 6e-3, "dw": 6e-3}, 1.5e-2),
    "balanced": ({"limit": 5e-3, "y": 4e-3, "final": 4e-3, "da": 6e-3, "db": 6e-3, "dw": 6e-3}, 3e-2),
    "fast": ({"limit": 7e-3, "da": 1e-2}, 8e-2),
}


@pytest.mark.parametrize("precision", MODES)
def test_precision_modes(precision):
    limits, repeated = MODES[precision]
    args = inputs(T=70, H=1, N=32, dtype=torch.bfloat16)
    dy, dfinal = cotangents(args[0], args[3], args[6])
    found = results(lambda *x: wkv7(*x, precision=precision), args, dy, dfinal)
    assert [x.dtype for x in found] == [torch.bfloat16, torch.float32, *(x.dtype for x in args)]
    assert_close(found, expected(args, dy, dfinal), **limits)
    args = inputs(T=70, H=1, N=32, decay=-1e-4, keys="one", dtype=torch.bfloat16)
    found = results(lambda *x: wkv7(*x, precision=precision), args, dy, dfinal)
    assert_close(found, expected(args, dy, dfinal), repeated)


@pytest.mark.parametrize("decay", [-0.6065, -5.0])
@pytest.mark.parametrize("precision", ["balanced", "fast"])
def test_the_gradient_of_strong_decays(precision, decay):
    """Where differently rounded operands would leave nothing of it (error near 1)."""
    args = inputs(T=40, H=1, N=32, decay=decay, dtype=torch.bfloat16)
    dy, dfinal = cotangents(args[0], args[3], args[6])
    found = results(lambda *x: wkv7(*x, precision=precision), args, dy, dfinal)
    assert_close(found, expected(args, dy, dfinal), 1e-2)


def test_mixed_dtypes():
    args = inputs(T=20)
    args[2], args[4] = args[2].bfloat16(), args[4].bfloat16()
    dy, dfinal = cotangents(args[0], args[3], args[6])
    found = results(wkv7, args, dy, dfinal)
    assert [x.dtype for x in found[2:]] == [x.dtype for x in args]
    assert_close(found, expected(args, dy, dfinal), CLOSE, dk=4e-3, da=4e-3)


def test_runs_repeat_bit_by_bit_and_rows_do_not_meet():
    args = inputs(B=3, T=17, H=1)
    dy, dfinal = cotangents(args[0], args[3], args[6])
    first = results(wkv7, args, dy, dfinal)
    again = results(wkv7, args, dy, dfinal)
    order = torch.tensor([2, 0, 1], device=DEVICE)
    moved = results(wkv7, [x[order] for x in args], dy[order], dfinal[order])
    for x, y, z in zip(first, again, moved, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x[order], z)


@pytest.mark.parametrize("segments", [2, 3, 5])
def test_a_scan_in_segments(segments):
    args = inputs(B=2, T=70, H=1)
    dy, dfinal = cotangents(args[0], args[3], args[6])
    assert_close(planned(args, dy, dfinal, segments=segments), expected(args, dy, dfinal), CLOSE)


def test_a_scan_in_segments_of_wide_heads():
    args = inputs(T=40, H=2, N=40)
    dy, dfinal = cotangents(args[0], args[3], args[6])
    assert_close(planned(args, dy, dfinal, segments=2), expected(args, dy, dfinal), CLOSE)


@pytest.mark.parametrize("at", [1, 15, 17])
def test_split_with_carried_state(at):
    args = inputs(T=33)
    dy, dfinal = cotangents(args[0], args[3], args[6])

    def split(*x):
        *tokens, state = x
        y1, state = wkv7(*(t[:, :at] for t in tokens), state)
        y2, state = wkv7(*(t[:, at:] for t in tokens), state)
        return torch.cat([y1, y2], 1), state

    assert_close(results(split, args, dy, dfinal), expected(args, dy, dfinal), CLOSE)


def test_gradients_of_one_output_only():
    args = inputs(T=20)
    dy, dfinal = cotangents(args[0], args[3], args[6])
    for only in (0, 1):
        leaves = [x.clone().requires_grad_() for x in args]
        found = torch.autograd.grad(wkv7(*leaves)[only], leaves, (dy, dfinal)[only], allow_unused=True)
        wanted = expected(args, dy * (only == 0), dfinal * (only == 1))
        assert_close([*wanted[:2], *found], wanted, CLOSE)


@pytest.mark.parametrize("place, groups", [(1, None), (3, None), (6, None), (2, 1), (3, 1)])
def test_gradients_of_some_inputs_only(place, groups):
    args = inputs(T=20, groups=groups)
    dy, dfinal = cotangents(args[0], args[3], args[6])
    args[place].requires_grad_()
    y, final = wkv7(*args)
    y.backward(dy, retain_graph=True)
    final.backward(dfinal)
    wanted = expected([x.detach() for x in args], dy, dfinal)[2 + place]
    assert (args[place].grad - wanted).norm() <= CLOSE * wanted.norm()
    assert all(x.grad is None for i, x in enumerate(args) if i != place)


def test_nothing_is_kept_without_gradients():
    args = inputs(T=20)
    _, _, starts, u = torch.ops.rwkvinside.wkv7_triton(*args, None, None, "fp32", False)
    assert starts.numel() == u.numel() == 0
    options = {"precision": "fp32", "capability": capability(u.device)}
    with pytest.raises(ValueError, match="has kept"):
        op.plan_backward(*args[:6], None, None, starts, u, args[3], None, **options)
    y, final = wkv7(*args)
    assert not y.requires_grad and not final.requires_grad


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    args = inputs(T=20)
    dy, dfinal = cotangents(args[0], args[3], args[6])
    plain = results(wkv7, args, dy, dfinal)
    leaves = [x.clone().requires_grad_() for x in args]
    y, final = checkpoint(wkv7, *leaves, use_reentrant=reentrant)
    torch.autograd.backward((y, final), (dy, dfinal))
    for x, leaf in zip(plain[2:], leaves, strict=True):
        assert torch.equal(x, leaf.grad)


def test_the_op_keeps_its_contract_with_pytorch():
    """Schema, fake tensors, autograd registration and tracing with symbolic sizes."""
    args = [x.requires_grad_() for x in inputs(T=17, H=1)]
    mask = torch.ones(1, 17, dtype=torch.bool, device=DEVICE)
    torch.library.opcheck(torch.ops.rwkvinside.wkv7_triton, (*args, mask, None, "fp32", True))


@pytest.mark.parametrize("within", [False, True])
def test_the_backward_op_keeps_its_contract_with_pytorch(within):
    args = inputs(T=17, groups=1, dtype=torch.bfloat16)
    dy, dfinal = cotangents(args[0], args[3], args[6])
    for precision in ("fp32", "balanced"):
        _, _, starts, u = torch.ops.rwkvinside.wkv7_triton(*args, None, None, precision, True)
        given = (*args[:6], None, None, starts, u, dy, dfinal, precision, within)
        torch.library.opcheck(torch.ops.rwkvinside.wkv7_triton_backward, given)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=on_a_gpu)])
def test_a_compiled_model_holds_one_op(backend):
    args = inputs(T=17, H=1)
    dy, dfinal = cotangents(args[0], args[3], args[6])
    found = results(torch.compile(wkv7, fullgraph=True, backend=backend), args, dy, dfinal)
    for x, y in zip(found, results(wkv7, args, dy, dfinal), strict=True):
        assert torch.equal(x, y)
    graphs = torch._dynamo.explain(wkv7)(*args).graphs
    calls = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("wkv7_triton" in call for call in calls) == len(graphs) == 1


@on_a_gpu
@pytest.mark.parametrize("precision", ["fp32", *MODES])
@pytest.mark.parametrize("N", [64, 128, 256])
def test_long_sequences_in_every_mode(precision, N):
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    args = inputs(B=2, T=700, H=3, N=N, dtype=dtype)
    dy, dfinal = cotangents(args[0], args[3], args[6])
    limits = {"limit": 5e-6} if precision == "fp32" else MODES[precision][0]
    found = results(lambda *x: wkv7(*x, precision=precision), args, dy, dfinal)
    assert_close(found, expected(args, dy, dfinal), **limits)


@on_a_gpu
@pytest.mark.parametrize("precision", ["fp32", *MODES])
def test_shipped_segments_agree_with_one_scan(precision):
    args = inputs(T=16384, H=1, N=64, dtype=torch.float32 if precision == "fp32" else torch.bfloat16)
    dy, dfinal = cotangents(args[0], args[3], args[6])
    assert op._split(args[0], None, precision)["segments"] > 1
    found = results(lambda *x: wkv7(*x, precision=precision), args, dy, dfinal)
    wanted = [x.double() for x in planned(args, dy, dfinal, precision=precision)]
    assert_close(found, wanted, 5e-6 if precision == "fp32" else 1e-2)


@on_a_gpu
def test_offsets_beyond_32_bits():
    args = inputs(T=65, H=1, N=64, dtype=torch.bfloat16)
    step = (1 << 31) // 64 + 64
    far = torch.empty(65 * step, dtype=torch.bfloat16, device=DEVICE).as_strided((1, 65, 1, 64), (0, step, 64, 1))
    far.copy_(args[3])
    dy, dfinal = cotangents(args[0], args[3], args[6])
    wanted = results(wkv7, args, dy, dfinal)
    args[3] = far
    for x, y in zip(results(wkv7, args, dy, dfinal), wanted, strict=True):
        assert torch.equal(x, y)


@on_a_gpu
def test_packing_does_not_wait_for_the_gpu():
    args = inputs(T=50, sequences=2)
    cu_seqlens = torch.tensor([0, 20, 50], device=DEVICE)
    wkv7(*args, cu_seqlens=cu_seqlens)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        wkv7(*args, cu_seqlens=cu_seqlens)
    finally:
        torch.cuda.set_sync_debug_mode("default")
