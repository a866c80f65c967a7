"""The Triton kernels of windows over whole sequences, in the interpreter or on a GPU. Run by test_window.py, or:

TRITON_INTERPRET=1 python -m pytest tests/kernels/window_cases.py
"""

import pytest
import torch

from rwkvinside.kernels.gpu import kernels, window
from rwkvinside.modeling.window_attention import (
    Beyond,
    Form,
    WindowState,
    dense_window_attention,
    empty_state,
    window_attention,
)

INTERPRETED = kernels.INTERPRETED.value
DEVICE = "cpu" if INTERPRETED else "cuda"
CLOSE = 2e-6 if INTERPRETED else 5e-6  # a GPU's exp2, log, and order of summation cost a little
# against the dense form in float64, of the same rounded inputs: relative L2 of outputs and gradients
ROUNDING = {torch.float32: CLOSE, torch.float16: 2e-3, torch.bfloat16: 8e-3}


def inputs(B, T, H, G, N, dtype=torch.float32, seed=0):
    """Queries, keys, values, and what scores the tokens beyond a window; values that `dtype` represents."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype).requires_grad_()

    far = normal(H, N), normal(H), normal(H)
    return tuple(normal(B, T, heads, N) for heads in (H, G, G)), Beyond(*(x.detach().float() * 0.5 for x in far))


def leaves_of(given, beyond, double=False):
    given = [x.detach().to(torch.float64 if double else x.dtype).requires_grad_() for x in given]
    far = None if beyond is None else Beyond(*(x.detach().to(given[0]).requires_grad_() for x in beyond))
    if beyond is not None and not double:
        far = Beyond(*(x.detach().clone().requires_grad_() for x in beyond))
    return given, far


def near(found, wanted, bound, least=0.1):
    """Relative to all of it, or to the least an element: a window of one token has no gradient of queries."""
    wanted = wanted.double()
    return (found.double() - wanted).norm() <= bound * max(wanted.norm(), least * wanted.numel() ** 0.5)


def compare(given, beyond, form, *, bound, **options):
    """Outputs and all gradients, those of the score's parameters included, by the dense form in float64."""
    own, far = leaves_of(given, beyond)
    exact, exact_far = leaves_of(given, beyond, double=True)
    found, _ = window_attention(*own, form._replace(beyond=far), backend="triton", **options)
    wanted = dense_window_attention(*exact, form._replace(beyond=exact_far), **options)
    assert found.values.dtype == own[2].dtype
    assert near(found.values, wanted.values, bound)
    random = torch.Generator().manual_seed(5)  # of the CPU: the same everywhere
    shapes = wanted.values.shape, (*wanted.values.shape[:3], 1)
    weight = [torch.randn(shape, generator=random).to(DEVICE) for shape in shapes]
    results = [(found.values.double() * weight[0]).sum(), (wanted.values * weight[0]).sum()]
    if beyond is not None:
        assert found.beyond.shape == wanted.beyond.shape and near(found.beyond, wanted.beyond, bound)
        results[0] = results[0] + (found.beyond.double() * weight[1]).sum()
        results[1] = results[1] + (wanted.beyond * weight[1]).sum()
    leaves = [*own, *(far or ())], [*exact, *(exact_far or ())]
    pairs = zip(*(torch.autograd.grad(r, x) for r, x in zip(results, leaves, strict=True)), strict=True)
    for name, (x, y) in zip(("q", "k", "v", "key", "bias", "growth"), pairs, strict=False):
        # a parameter's gradient is a sum over tokens of either sign, which cancel; what inputs were rounded by does not
        whole = name in ("q", "k", "v") or own[0].dtype == torch.float32
        close = near(x, y, bound) if whole else near(x, y, 2 * bound, least=1)
        assert close, (name, (x - y).norm() / y.norm())


def bounds_of(*cuts):
    return torch.tensor(cuts, dtype=torch.int32, device=DEVICE)


CUTS = {
    "rows": None,
    "documents": (0, 1, 2, 9, 50, 50, 90, 91, 125, 180),  # shorter and longer than blocks, one empty
}


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize(
    "size, sinks, scored",
    [(1, 0, True), (1, 2, True), (5, 4, False), (5, 4, True), (40, 0, False), (40, 1, True), (200, 4, False)],
)
def test_outputs_and_gradients_are_those_of_the_dense_form(size, sinks, scored, cuts):
    given, beyond = inputs(2, 90, 2, 1, 16)
    options = {"cu_seqlens": None if cuts is None else bounds_of(*cuts)}
    compare(given, beyond if scored else None, Form(size, sinks), bound=CLOSE, **options)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("N", [8, 24, 128])
def test_dtypes_and_head_sizes(N, dtype):
    given, beyond = inputs(1, 80, 2, 1, N, dtype)
    compare(given, beyond, Form(10, 3), bound=ROUNDING[dtype])


def test_the_largest_heads_and_more_first_tokens_than_a_block():
    given, beyond = inputs(1, 70, 1, 1, 256, torch.bfloat16)
    compare(given, beyond, Form(8, 40), bound=ROUNDING[torch.bfloat16])


@pytest.mark.parametrize("scored", [False, True])
def test_a_soft_cap(scored):
    given, beyond = inputs(1, 70, 4, 2, 16)
    given = [(3 * x).detach() for x in given]
    compare(given, beyond if scored else None, Form(12, 2, 1.5), bound=2.5 * CLOSE)


@pytest.mark.parametrize("packed", [False, True])
def test_padding_wherever_it_is(packed):
    given, beyond = inputs(2, 70, 2, 2, 16)
    mask = torch.rand(2, 70, generator=torch.Generator().manual_seed(2)).to(DEVICE) < 0.6
    options = {"mask": mask, "cu_seqlens": bounds_of(0, 1, 2, 9, 50, 70, 71, 140) if packed else None}
    compare(given, beyond, Form(7, 2), bound=CLOSE, **options)
    with torch.no_grad():
        given[0][~mask], given[1][~mask], given[2][~mask] = (torch.nan,) * 3
    out, _ = window_attention(*given, Form(7, 2, beyond=beyond), backend="triton", **options)
    assert out.values.isfinite().all() and (out.values[~mask] == 0).all() and (out.beyond[~mask] == 0).all()


@pytest.mark.parametrize("packed", [False, True])
def test_pieces_with_a_state_equal_the_whole(packed):
    """Also the state itself, and gradients through it."""
    given, beyond = inputs(2, 60, 4, 2, 16)
    form = Form(6, 2)
    whole = dense_window_attention(
        *given, form._replace(beyond=beyond), cu_seqlens=bounds_of(0, 35, 60, 120) if packed else None
    ).values
    state = empty_state(given[1], 8) if packed else None
    parts = []
    for begin, end in ((0, 20), (20, 21), (21, 60)):
        cut = [x[:, begin:end] for x in given]
        size = end - begin
        bounds = bounds_of(0, *([35 - begin] if begin < 35 < end else []), size, 2 * size) if packed else None
        out, state = window_attention(
            *cut, form._replace(beyond=beyond), state=state, cu_seqlens=bounds, backend="triton"
        )
        parts.append(out.values)
    found = torch.cat(parts, 1)
    assert near(found, whole, CLOSE) and isinstance(state, WindowState)
    weight = torch.randn_like(whole)
    pairs = (torch.autograd.grad((x * weight).sum(), given) for x in (found, whole))
    assert all(near(x, y, CLOSE) for x, y in zip(*pairs, strict=True))


def test_two_runs_agree_bit_for_bit_whatever_lies_in_memory():
    given, beyond = inputs(1, 150, 2, 1, 16, torch.bfloat16)
    runs = []
    for value in (torch.nan, 7.0):
        rubbish = [torch.full((1, 150, 2, 16), value, device=DEVICE) for _ in range(40)]
        del rubbish
        out, _ = window_attention(*given, Form(9, 3, beyond=beyond), backend="triton")
        runs.append((*out, *torch.autograd.grad(out.values.sum() + out.beyond.sum(), given)))
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_strides_are_taken_as_they_are():
    """Heads before tokens, as attention layers have them."""
    given, beyond = inputs(1, 70, 4, 2, 16)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2).detach() for x in given]
    assert not turned[0].is_contiguous()
    compare(turned, beyond, Form(9, 3), bound=CLOSE)
    wanted, found = (window_attention(*x, Form(9, 3), backend="triton")[0].values for x in (given, turned))
    assert torch.equal(wanted, found)


def test_heads_that_lie_further_apart_than_32_bits_count():
    """As those of a very long row do where heads come before tokens; memory that is not written to takes none."""
    (q, k, v), _ = inputs(1, 3, 3, 1, 16, torch.bfloat16)
    apart = torch.empty(2**31 + 48, dtype=torch.bfloat16, device=DEVICE).as_strided(q.shape, (48, 16, 2**30, 1))
    given = [apart.copy_(q.detach()).requires_grad_(), k, v]
    wanted, found = (window_attention(*x, Form(2, 1), backend="triton")[0].values for x in ((q, k, v), given))
    assert torch.equal(found, wanted)
    pairs = zip(*(torch.autograd.grad(x.sum(), y) for x, y in ((wanted, (q, k, v)), (found, given))), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)


def test_the_op_is_what_torch_expects():
    given, beyond = inputs(1, 40, 2, 1, 16)
    start = torch.zeros(40, dtype=torch.int64, device=DEVICE)
    args = *(x[0] for x in given), start, None, *(x.requires_grad_() for x in beyond), 5, 2, 0.0
    torch.library.opcheck(
        window._attend, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static")
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"q": torch.zeros(9, 4, 12)},
        {"q": torch.zeros(9, 4, 16, dtype=torch.float64)},
        {"k": torch.zeros(9, 3, 16)},
        {"v": torch.zeros(9, 2, 16, dtype=torch.bfloat16)},
        {"start": torch.zeros(9)},
        {"count": torch.zeros(8, dtype=torch.int64)},
        {"window": 0},
        {"sinks": -1},
        {"far": (torch.zeros(4, 16), torch.zeros(4), torch.zeros(3))},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_the_op_refuses_what_does_not_fit(wrong):
    given = {"q": torch.zeros(9, 4, 16), "k": torch.zeros(9, 2, 16), "v": torch.zeros(9, 2, 16)}
    given |= {"start": torch.zeros(9, dtype=torch.int64), "window": 4, "sinks": 1}
    with pytest.raises(ValueError):
        window.window_attention(**given | wrong)
