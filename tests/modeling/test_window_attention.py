"""Window attention by blocks and by single tokens, against the dense form, and that against loops over a document."""

import math

import pytest
import torch
from cases import pairwise
from torch.utils._python_dispatch import TorchDispatchMode

from rwkvinside.modeling import window_attention as window_module
from rwkvinside.modeling.window_attention import Beyond, Form, WindowState

B, H, G, N = 2, 4, 2, 8
# windows, sinks, and whether what lies beyond has a score; T is at most 150
SIZES = [(1, 0, False), (1, 1, True), (4, 0, True), (4, 4, False), (4, 4, True), (32, 1, True), (32, 4, False)]
SIZES += [(200, 0, False), (200, 4, True)]
BEYOND = Beyond(
    torch.randn(H, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.5,
    torch.tensor([-1.0, 0.0, 0.5, 1.0], dtype=torch.float64),
    torch.tensor([0.0, 0.5, 1.0, 1.5], dtype=torch.float64),
)


def inputs(T, dtype=torch.float64, batch=B, grad=False):
    torch.manual_seed(T)
    shapes = [(batch, T, heads, N) for heads in (H, G, G)]
    return tuple(torch.randn(*shape, dtype=dtype).requires_grad_(grad) for shape in shapes)


def far(scored, grad=False):
    """Keys, biases and growths of what lies beyond a window, that may get a gradient."""
    return {"beyond": Beyond(*(x.clone().requires_grad_(grad) for x in BEYOND))} if scored else {}


def joined(attended):
    """What is attended to, and the weight of what lies beyond in one more channel."""
    return attended.values if attended.beyond is None else torch.cat(attended, -1)


def window_attention(q, k, v, *, window, sinks, softcap=None, beyond=None, **options):
    attended, state = window_module.window_attention(q, k, v, Form(window, sinks, softcap, beyond), **options)
    return joined(attended), state


def dense_window_attention(q, k, v, *, window, sinks, softcap=None, beyond=None, **options):
    return joined(window_module.dense_window_attention(q, k, v, Form(window, sinks, softcap, beyond), **options))


def bounds_of(*cuts):
    return torch.tensor(cuts, dtype=torch.int32)


def loops(given, window, sinks, scored, mask=None, bounds=None):
    """The sentences of the module's first lines, one token and one head at a time."""
    T = given[0].shape[1]
    bounds = bounds or [b * T for b in range(B + 1)]
    q, k, v = (x.flatten(0, 1) for x in given)
    out = torch.zeros(B * T, H, N + scored, dtype=q.dtype)
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        document = [i for i in range(begin, end) if mask is None or mask.flatten()[i]]
        for t, i in enumerate(document):
            seen = [document[j] for j in range(t + 1) if j > t - window or j < sinks]
            for h in range(H):
                g = h // (H // G)
                scores, count = k[seen, g] @ q[i, h] / N**0.5, t + 1 - len(seen)
                if scored and count:
                    score = q[i, h] @ BEYOND.key[h] + BEYOND.bias[h] + BEYOND.growth[h] * math.log(count)
                    scores = torch.cat([scores, score[None]])
                weights = scores.softmax(0)
                out[i, h, :N] = weights[: len(seen)] @ v[seen, g]
                if scored and count:
                    out[i, h, N] = weights[-1]
    return out.view(B, T, H, -1)


@pytest.mark.parametrize("window, sinks, scored", SIZES)
def test_the_dense_form_is_what_the_words_say(window, sinks, scored):
    given = inputs(40)
    mask = torch.rand(B, 40) < 0.7
    cuts = [0, 1, 2, 30, 40, 57, 57, 80]
    for real, bounds in ((None, None), (mask, None), (None, cuts), (mask, cuts)):
        found = dense_window_attention(
            *given, window=window, sinks=sinks, mask=real, cu_seqlens=bounds and bounds_of(*bounds), **far(scored)
        )
        assert (found - loops(given, window, sinks, scored, real, bounds)).abs().max() < 1e-12


CASES = {
    "rows": {},
    "documents": {"cuts": (0, 1, 2, 9, 70, 150, 151, 190, 290, 290, 300)},  # shorter and longer than windows, one empty
    "single": {"cuts": tuple(range(301))},
    "left": {"mask": lambda at: at >= torch.tensor([[13], [0]])},
    "right": {"mask": lambda at: at < torch.tensor([[150], [3]])},
    "scattered": {"mask": lambda at: torch.rand(B, 150, generator=torch.Generator().manual_seed(2)) < 0.6},
    "scattered in documents": {
        "cuts": (0, 1, 2, 9, 70, 150, 151, 190, 290, 300),
        "mask": lambda at: torch.rand(B, 150, generator=torch.Generator().manual_seed(2)) < 0.6,
    },
    "nothing": {"mask": lambda at: at < torch.tensor([[150], [0]])},
}


def options_of(case):
    cuts, mask = CASES[case].get("cuts"), CASES[case].get("mask")
    return {
        "cu_seqlens": None if cuts is None else bounds_of(*cuts),
        "mask": None if mask is None else mask(torch.arange(150)[None]).expand(B, -1),
    }


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("window, sinks, scored", SIZES)
def test_blocks_equal_the_dense_form_with_all_gradients(window, sinks, scored, case):
    given, beyond = inputs(150, grad=True), far(scored, grad=True)
    options = {"window": window, "sinks": sinks} | beyond | options_of(case)
    weight = torch.randn(B, 150, H, N + scored, dtype=torch.float64)
    leaves = given + (tuple(beyond["beyond"]) if scored and window < 150 else ())
    found, state = window_attention(*given, **options)
    wanted = dense_window_attention(*given, **options)
    assert (found - wanted).abs().max() < 1e-10
    assert (state is None) == (options["cu_seqlens"] is not None)
    alone, state = window_attention(*given, keep_state=False, **options)
    assert (alone == found).all() and state is None
    exact = torch.autograd.grad((wanted * weight).sum(), leaves)
    for x, y in zip(torch.autograd.grad((found * weight).sum(), leaves), exact, strict=True):
        assert (x - y).abs().max() < 1e-10

    single = tuple(x.detach().float().requires_grad_() for x in given)
    found = window_attention(*single, **options)[0]
    assert (found - wanted).abs().max() < 5e-6
    for x, y in zip(torch.autograd.grad((found * weight.float()).sum(), single), exact, strict=False):
        assert (x - y).abs().max() < 5e-6 * max(1, y.abs().max())


@pytest.mark.parametrize("case", ["rows", "documents", "scattered", "scattered in documents", "nothing"])
@pytest.mark.parametrize("window, sinks, scored", [(4, 0, True), (32, 4, False), (200, 1, True)])
def test_scores_with_a_soft_cap(window, sinks, scored, case):
    """Blocks, their gradients, and chunks and single tokens from a state, by the dense form and that by hand."""
    given = tuple((3 * x).requires_grad_() for x in inputs(150))
    options = {"window": window, "sinks": sinks, "softcap": 1.5} | far(scored) | options_of(case)
    weight = torch.randn(B, 150, H, N + scored, dtype=torch.float64)
    found, wanted = window_attention(*given, **options)[0], dense_window_attention(*given, **options)
    assert (found - wanted).abs().max() < 1e-10
    exact = torch.autograd.grad((wanted * weight).sum(), given)
    for x, y in zip(torch.autograd.grad((found * weight).sum(), given), exact, strict=True):
        assert (x - y).abs().max() < 1e-10
    assert (found - window_attention(*given, **options | {"softcap": None})[0]).abs().max() > 0.1
    if options["cu_seqlens"] is not None:
        return
    for chunk in (1, 40):
        state, parts = None, []
        for t in range(0, 150, chunk):
            mask = None if options["mask"] is None else options["mask"][:, t : t + chunk]
            cut = tuple(x[:, t : t + chunk] for x in given)
            part, state = window_attention(*cut, **options | {"mask": mask, "state": state})
            parts.append(part)
        assert (torch.cat(parts, 1) - wanted).abs().max() < 1e-12


def test_the_soft_cap_is_that_of_transformers():
    q, k, v = inputs(30)
    scores = 2.0 * torch.tanh(q.transpose(1, 2) @ k.transpose(1, 2).repeat_interleave(2, 1).mT * N**-0.5 / 2.0)
    scores = scores.masked_fill(torch.ones(30, 30, dtype=torch.bool).triu(1), -torch.inf)
    wanted = (scores.softmax(-1) @ v.transpose(1, 2).repeat_interleave(2, 1)).transpose(1, 2)
    assert (window_attention(q, k, v, window=30, sinks=0, softcap=2.0)[0] - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("window, sinks", [(256, 4), (300, 0), (70, 100)])
def test_windows_wider_than_a_block(window, sinks):
    given = inputs(700, batch=1)
    cuts = bounds_of(0, 10, 650, 700)
    for cu_seqlens in (None, cuts):
        options = {"window": window, "sinks": sinks, "cu_seqlens": cu_seqlens}
        assert (window_attention(*given, **options)[0] - dense_window_attention(*given, **options)).abs().max() < 1e-10


@pytest.mark.parametrize(
    "chunk, size, case", pairwise([1, 2, 7, 33], SIZES, ["rows", "left", "right", "scattered", "nothing"])
)
def test_chunks_with_a_state_equal_the_whole(chunk, size, case):
    (window, sinks, scored), given, mask = size, inputs(150), options_of(case)["mask"]
    options = {"window": window, "sinks": sinks} | far(scored)
    whole, end = window_attention(*given, mask=mask, **options)
    for inplace in (False, True):
        state, parts = None, []
        for t in range(0, 150, chunk):
            cut = slice(t, t + chunk)
            part, state = window_attention(
                *(x[:, cut] for x in given),
                state=state,
                mask=None if mask is None else mask[:, cut],
                inplace=inplace and state is not None,
                **options,
            )
            parts.append(part)
        assert (torch.cat(parts, 1) - whole).abs().max() < 1e-12
        assert all(torch.equal(x, y) for x, y in zip(state, end, strict=True))
    assert state.seen.tolist() == ([150, 150] if mask is None else mask.sum(1).tolist())


def test_gradients_pass_through_a_state():
    given = inputs(30, grad=True)
    options = {"window": 8, "sinks": 2} | far(True)
    weight = torch.randn(B, 30, H, N + 1, dtype=torch.float64)
    wanted = torch.autograd.grad((window_attention(*given, **options)[0] * weight).sum(), given)
    for cuts in ((11, 19), (29, 1)):
        state, parts = None, []
        for part in zip(*(x.split(cuts, 1) for x in given), strict=True):
            y, state = window_attention(*part, state=state, **options)
            parts.append(y)
        found = torch.autograd.grad((torch.cat(parts, 1) * weight).sum(), given)
        assert all((x - y).abs().max() < 1e-12 for x, y in zip(found, wanted, strict=True))


def test_a_token_is_written_into_the_memory_of_the_state_if_it_may_be():
    _, state = window_attention(*inputs(20), window=6, sinks=2)
    before = WindowState(*(x.clone() for x in state))
    one = inputs(1)
    _, after = window_attention(*one, window=6, sinks=2, state=state)
    assert all(torch.equal(x, y) for x, y in zip(state, before, strict=True))
    _, same = window_attention(*one, window=6, sinks=2, state=state, inplace=True)
    assert all(x is y for x, y in zip(same, state, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(same, after, strict=True))
    changed = (same.k != before.k).any(-1).any(1)
    assert changed.sum(1).tolist() == [1, 1], "one slot of each row, nothing is moved"


@pytest.mark.parametrize("T", [1, 9])
def test_nothing_behind_padding_comes_through(T):
    given = inputs(T)
    mask = torch.arange(T) >= torch.tensor([[1], [0]])
    for x in given:
        x[0, 0] = torch.nan
    given = tuple(x.requires_grad_() for x in given)
    for state in (None, window_attention(*inputs(5), window=4, sinks=1)[1]):
        out, after = window_attention(*given, window=4, sinks=1, mask=mask, state=state, **far(True))
        gradients = torch.autograd.grad(out.square().sum(), given)
        assert out.isfinite().all() and (out[0, 0] == 0).all() and after.k.isfinite().all()
        assert all(x.isfinite().all() and (x[0, 0] == 0).all() for x in gradients)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("scored", [False, True])
def test_memory_grows_with_the_tokens_alone(scored):
    def largest(T, attend=window_attention):
        given = inputs(T, torch.float32, batch=1, grad=True)
        with Largest() as seen:
            out = attend(*given, window=16, sinks=2, **far(scored))
            (out if attend is dense_window_attention else out[0]).sum().backward()
        return seen.elements

    assert largest(1024, dense_window_attention) >= 1024**2, "the measure sees such a tensor"
    # the most is a mask: queries that share keys, times the keys of a block
    assert largest(2048) == 2 * largest(1024) == 2048 * (H // G) * (64 + 16 + 2 + scored)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_score_of_what_lies_beyond_keeps_its_digits_in_bf16(softcap):
    """A score of 11 has steps of 1/16 there."""
    q, k, v = (x.bfloat16() for x in inputs(40, torch.float32))
    key = torch.zeros(H, N)
    beyond = {"beyond": Beyond(key, torch.tensor([11.03, 10.98, 11.1, 11.02]), torch.zeros(H))}
    form = {"window": 4, "sinks": 1, "softcap": softcap}
    found, _ = window_attention(0 * q, k, v, **form, **beyond)
    exact = dense_window_attention(0 * q.float(), k.float(), v.float(), **form, **beyond)
    assert ((found.float() - exact).abs() / exact.abs())[:, 5:, :, N].max() < 2**-8


def test_keys_take_the_dtype_of_the_values():
    q, k, v = inputs(9, torch.float32)
    out, state = window_attention(q, k, v.bfloat16(), window=4, sinks=1)
    assert {x.dtype for x in (out, state.k, state.v)} == {torch.bfloat16} and state.seen.dtype == torch.int64
    exact = dense_window_attention(q, k, v, window=4, sinks=1)
    assert (out.float() - exact).norm() / exact.norm() < 0.01


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("window, sinks, scored", [(1, 0, True), (4, 0, False), (4, 2, True), (32, 4, True)])
def test_the_first_document_of_a_row_goes_on_from_its_state(window, sinks, scored, masked):
    """Rows that are read in pieces, with documents across the borders, as if each document were read alone."""
    given = inputs(60)
    mask = torch.rand(B, 60, generator=torch.Generator().manual_seed(1)) < 0.8 if masked else None
    starts = [(0, 3, 25, 26, 40), (0, 15, 45)]  # of the documents of each row
    whole = bounds_of(*(60 * row + at for row, own in enumerate(starts) for at in own), 2 * 60)
    expected = dense_window_attention(*given, window=window, sinks=sinks, mask=mask, cu_seqlens=whole, **far(scored))
    state, found = window_attention(*inputs(1), window=window, sinks=sinks)[1], []
    state = state._replace(seen=torch.zeros_like(state.seen))
    for begin, end in ((0, 20), (20, 30), (30, 60)):
        size = end - begin
        cuts = [[0, *(at - begin for at in own if begin < at < end)] for own in starts]
        bounds = bounds_of(*(size * row + at for row, own in enumerate(cuts) for at in own), 2 * size)
        anew = torch.tensor([begin in own for own in starts])
        state = state._replace(seen=torch.where(anew, 0, state.seen))
        part = [x[:, begin:end] for x in given]
        options = {"mask": None if mask is None else mask[:, begin:end], "state": state, "cu_seqlens": bounds}
        options |= far(scored)
        out, state = window_attention(*part, window=window, sinks=sinks, **options)
        found.append(out)
    assert (torch.cat(found, 1) - expected).abs().max() < 1e-12
