"""The WKV-7 op: chunked against the loop over time, and the properties that both must have."""

import math

import pytest
import torch

from rwkvinside import kernels
from rwkvinside.modeling.wkv7 import wkv7
from rwkvinside.modeling.wkv7_chunked import Chunked

MIN_DECAY = -math.exp(-0.5)


def inputs(B, T, H, N, dtype=torch.float64, seed=0, shift=0.0, grad=False):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    r, k, v = normal(B, T, H, N), normal(B, T, H, N), normal(B, T, H, N)
    log_decay = MIN_DECAY * torch.sigmoid(2 * normal(B, T, H, N) + shift)
    kk = torch.nn.functional.normalize(normal(B, T, H, N), dim=-1)
    a, b = -kk, kk * torch.sigmoid(normal(B, T, H, N))
    state = normal(B, H, N, N)
    return [x.to(dtype).requires_grad_(grad) for x in (r, log_decay, k, v, a, b, state)]


def run(x, backend, seed=1, **kwargs):
    """Outputs, final state and the gradients of a random function of both."""
    x = [t.detach().clone().requires_grad_() for t in x]
    y, final = wkv7(*x[:6], x[6], backend=backend, **kwargs)
    g = torch.Generator().manual_seed(seed)
    weights = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype) for t in (y, final)]
    ((y * weights[0]).sum() + (final * weights[1]).sum()).backward()
    return [y.detach(), final.detach(), *(t.grad for t in x)]


def worst(got, expected):
    return max(
        ((p.double() - q.double()).norm() / q.double().norm().clamp_min(1e-30)).item()
        for p, q in zip(got, expected, strict=True)
    )


@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 33, 64, 100])
@pytest.mark.parametrize("N", [8, 16, 40, 64])
def test_chunked_equals_reference_in_float64(T, N):
    x = inputs(2, T, 3, N)
    assert worst(run(x, "chunked"), run(x, "reference")) < 1e-10


@pytest.mark.parametrize("N", [8, 64, 256])
@pytest.mark.parametrize("shift", [0.0, -6.0], ids=["mixed decay", "slow decay"])
def test_chunked_in_float32_against_the_float64_reference(N, shift):
    x = inputs(1, 130, 2, N, torch.float32, shift=shift)
    # 5e-6: fp32 rounding through 130 steps; the decay gradient is a difference of sums and the worst of them
    assert worst(run(x, "chunked"), run([t.double() for t in x], "reference")) < 5e-6


def test_many_blocks_of_chunks_give_the_same(monkeypatch):
    x = inputs(2, 200, 3, 16)
    expected = run(x, "reference")
    monkeypatch.setattr(Chunked, "BLOCK", 1)
    assert worst(run(x, "chunked"), expected) < 1e-10
    cu = torch.tensor([0, 3, 3, 100, 117, 200])
    x = inputs(1, 200, 3, 16)
    x[6] = torch.randn(5, 3, 16, 16, dtype=torch.float64)
    assert worst(run(x, "chunked", cu_seqlens=cu), run(x, "reference", cu_seqlens=cu)) < 1e-10


@pytest.mark.parametrize("value", [0.0, -1e-6, MIN_DECAY, -2.0, -5.0])
def test_extreme_decays(value):
    x = inputs(1, 70, 2, 32)
    x[1] = torch.full_like(x[1], value)
    x[1][..., ::3] = -0.01
    assert worst(run(x, "chunked"), run(x, "reference")) < 1e-9


def test_repeated_keys():
    x = inputs(1, 130, 2, 64, torch.float32)
    kk = torch.nn.functional.normalize(torch.randn(1, 1, 2, 64), dim=-1).expand(1, 130, 2, 64)
    x[1], x[4], x[5] = torch.full_like(x[1], -1e-3), -kk, 0.99 * kk
    # a repeated key makes the triangular system as ill-conditioned as it gets; 2e-5 is what exact substitution leaves
    # in fp32
    assert worst(run(x, "chunked"), run([t.double() for t in x], "reference")) < 2e-5


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("cut", [1, 31, 32, 33, 77])
def test_a_split_with_carried_state_changes_nothing(backend, cut):
    x = inputs(2, 90, 2, 32)
    whole = run(x, backend)
    parts = [t.detach().clone().requires_grad_() for t in x]
    y1, middle = wkv7(*(t[:, :cut] for t in parts[:6]), parts[6], backend=backend)
    y2, final = wkv7(*(t[:, cut:] for t in parts[:6]), middle, backend=backend)
    y = torch.cat([y1, y2], 1)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in (y, final)]
    ((y * weights[0]).sum() + (final * weights[1]).sum()).backward()
    assert worst([y.detach(), final.detach(), *(t.grad for t in parts)], whole) < 1e-11


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_masked_steps_leave_no_trace(backend):
    B, T, H, N = 2, 60, 2, 16
    x = inputs(B, T, H, N)
    where = torch.tensor([i for i in range(100) if i % 5 not in (0, 3)])
    mask = torch.zeros(B, 100, dtype=torch.bool)
    mask[:, where] = True
    garbage = inputs(B, 100, H, N, seed=5)
    padded = [p.index_copy(1, where, t) for p, t in zip(garbage[:6], x[:6], strict=True)] + [x[6]]
    y, final = wkv7(*padded[:6], padded[6], mask=mask, backend=backend)
    expected, expected_final = wkv7(*x[:6], x[6], backend=backend)
    assert worst([y[:, where], final], [expected, expected_final]) < 1e-12
    assert y[:, ~mask[0]].abs().max() == 0
    leaves = [t.clone().requires_grad_() for t in padded]
    y, final = wkv7(*leaves[:6], leaves[6], mask=mask, backend=backend)
    (y.sum() + final.sum()).backward()
    assert all(t.grad[:, ~mask[0]].abs().max() == 0 for t in leaves[:6])


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_packed_documents_equal_the_documents_alone(backend):
    lengths = [1, 2, 31, 0, 32, 33, 5, 70]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    x = inputs(1, sum(lengths), 2, 32)
    x[6] = torch.randn(len(lengths), 2, 32, 32, dtype=torch.float64)
    packed = run(x, backend, cu_seqlens=bounds)
    leaves = [t.detach().clone().requires_grad_() for t in x]
    ys, finals = [], []
    for s, length in enumerate(lengths):
        part = slice(bounds[s], bounds[s] + length)
        y, final = wkv7(*(t[:, part] for t in leaves[:6]), leaves[6][s : s + 1], backend="reference")
        ys.append(y)
        finals.append(final)
    y, final = torch.cat(ys, 1), torch.cat(finals)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in (y, final)]
    ((y * weights[0]).sum() + (final * weights[1]).sum()).backward()
    assert worst(packed, [y.detach(), final.detach(), *(t.grad for t in leaves)]) < 1e-10


@pytest.mark.integration
def test_gradcheck():
    x = inputs(1, 18, 1, 8, grad=True)
    torch.autograd.gradcheck(lambda *t: wkv7(*t[:6], t[6], backend="chunked"), x, atol=1e-7)


def test_head_permutation_and_strided_inputs():
    x = inputs(2, 40, 4, 16)
    y, final = wkv7(*x[:6], x[6], backend="chunked")
    order = torch.tensor([2, 0, 3, 1])
    y2, final2 = wkv7(*(t[:, :, order] for t in x[:6]), x[6][:, order], backend="chunked")
    assert torch.equal(y[:, :, order], y2) and torch.equal(final[:, order], final2)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in x[:6]]
    assert torch.equal(wkv7(*strided, x[6], backend="chunked")[0], y)


def test_closed_forms():
    T, N = 20, 16
    eye = torch.eye(N, dtype=torch.float64)[torch.arange(T) % N][None, :, None, :]
    zero = torch.zeros(1, T, 1, N, dtype=torch.float64)
    values = torch.randn(1, T, 1, N, dtype=torch.float64)
    # orthonormal keys, rate 1, no decay: an exact overwriting memory
    y, state = wkv7(eye, zero, eye, values, -eye, eye, backend="chunked")
    assert torch.allclose(y, values, atol=1e-12)
    assert torch.allclose(state[0, 0].T, torch.cat([values[0, 16:, 0], values[0, 4:16, 0]]), atol=1e-12)
    # no removal: plain linear attention with decay
    r, w, k, v, _, _, _ = inputs(1, T, 1, N)
    y, _ = wkv7(r, w, k, v, zero, zero, backend="chunked")
    c = w.cumsum(1)[0, :, 0]
    expected = torch.stack(
        [
            sum((r[0, t, 0] * (c[t] - c[s]).exp() * k[0, s, 0]).sum() * v[0, s, 0] for s in range(t + 1))
            for t in range(T)
        ]
    )
    assert torch.allclose(y[0, :, 0], expected, atol=1e-10)


@pytest.mark.integration
def test_against_flas_naive_recurrence():
    naive = pytest.importorskip(
        "fla.ops.generalized_delta_rule.dplr.naive", reason="flash-linear-attention is not installed"
    )
    x = inputs(2, 50, 3, 32, torch.float32)
    r, w, k, v, a, b = (t.transpose(1, 2) for t in x[:6])
    y, state = naive.dplr_recurrence(r, k, v, a, b, w, initial_state=x[6].transpose(-1, -2), output_final_state=True)
    for backend in ("auto", "chunked"):
        got, final = wkv7(*x[:6], x[6], backend=backend)
        assert worst([got, final], [y.transpose(1, 2) * 32**0.5, state.transpose(-1, -2)]) < 2e-6


def test_bf16_inputs_keep_state_and_decay_in_fp32():
    x = inputs(1, 40, 2, 32, torch.float32)
    low = [t.bfloat16() for t in x[:6]]
    low[1] = x[1]
    y, state = wkv7(*low, backend="chunked")
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    expected, _ = wkv7(*(t.double() for t in low), backend="reference")
    assert worst([y], [expected]) < 4e-3  # rounding of the bf16 output
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _ = wkv7(*x[:6], backend="chunked")
    outside, _ = wkv7(*x[:6], backend="chunked")
    assert torch.equal(inside, outside)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: dict(backend="cuda"), "unknown WKV-7 backend 'cuda'"),
        (lambda x: dict(precision="fp8"), "unknown WKV-7 precision 'fp8'"),
        (lambda x: dict(cu_seqlens=torch.tensor([0, 5])), "batch of 1"),
        (lambda x: dict(mask=torch.ones(2, 3, dtype=torch.bool)), "mask has shape"),
        (lambda x: dict(state=x[6][:1]), "state has shape"),
    ],
)
def test_refusals(change, message):
    x = inputs(2, 5, 1, 8)
    with pytest.raises(ValueError, match=message):
        wkv7(*x[:6], **change(x))


@pytest.mark.parametrize("change", [lambda x: x[0].long(), lambda x: x[0][0]])
def test_what_is_no_sequence_of_heads_is_refused(change):
    x = inputs(2, 5, 1, 8)
    with pytest.raises(ValueError, match=r"r is torch\..* of shape .*: it must be floating point, \(B, T, H, N\)"):
        wkv7(change(x), *x[1:6])


def test_compiled_models_run_the_chunked_path_as_it_is():
    graphs = []

    def compiler(graph, _):
        graphs.append(graph.code)
        return graph.forward

    x = [t.requires_grad_() for t in inputs(1, 20, 1, 8)]
    compiled = torch.compile(lambda *t: wkv7(*t, backend="chunked")[0] * 2, backend=compiler)
    y = compiled(*x[:6])
    assert graphs and not any("cumsum" in code or "solve_triangular" in code for code in graphs)
    found = torch.autograd.grad(y.sum(), x[:6])
    expected = wkv7(*x[:6], backend="chunked")[0] * 2
    assert torch.equal(y, expected)
    for one, other in zip(found, torch.autograd.grad(expected.sum(), x[:6]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["reference", "chunked", "native"])
def test_a_log_decay_above_zero_is_refused_where_it_is_read(backend):
    if backend == "native" and kernels.why_unavailable("native"):
        pytest.skip("no native kernel")
    x = [t.float() for t in inputs(2, 5, 1, 8)]
    x[1][1, 2, 0, 3] = 0.25
    with pytest.raises(ValueError, match="log_decay reaches 0.25: it must be 0 or below, or the state explodes"):
        wkv7(*x[:6], backend=backend)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 2] = False
    masked, _ = wkv7(*x[:6], mask=mask, backend=backend)
    with torch.no_grad():  # inference does not look
        wkv7(*x[:6], backend=backend)
    x[1][1, 2, 0, 3] = 0
    assert torch.equal(masked, wkv7(*x[:6], mask=mask, backend=backend)[0])
    wkv7(*(t[:, :0] for t in x[:6]), backend="reference")  # nothing is there to be refused


def test_named_backends_do_not_fall_back():
    x = inputs(1, 5, 1, 8)
    with pytest.raises(RuntimeError, match="'triton' cannot run"):
        wkv7(*x[:6], backend="triton")
    x[1] = torch.full_like(x[1], -6.0)
    with pytest.raises(ValueError, match="clamp it"):
        wkv7(*x[:6], backend="chunked")
