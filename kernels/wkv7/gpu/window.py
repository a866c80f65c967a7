"""Attention to a window of whole sequences in Triton, forward and backward: `window_attention` as a PyTorch op.

`rwkvinside.modeling.window_attention` has the equations and, in PyTorch, the reference. Tokens lie side by side, each
with the index of the first one of its document. A program owns a block of queries of one head and goes over the keys
that these can see: those of its own block, of the W tokens before it, and the first S of the one document that may have
begun earlier ("far"). Scores live in registers only. What lies beyond the window enters the softmax by its score, which
is a product of the query and part of the op.

The backward keeps the output and, per query and head, the logarithm of the sum of its exponents (base 2), and computes
the weights again: in a program for each block of queries (their gradients, and parts of those of the first S tokens of
documents and of the score's parameters), and then in a program for each block of keys, which also takes up the parts of
its far queries, added by a launch between the two. No atomics: two runs agree bit for bit.

With p the weights, o = sum_j p_j v_j, p_z the weight of what lies beyond, and do, dp_z the gradients of both:

    delta = do . o + dp_z p_z        ds_j = p_j (do . v_j - delta)        ds_z = p_z (dp_z - delta)
    dq = scale sum_j ds_j k_j + ds_z far_key        dk_j = scale sum_q ds_j q        dv_j = sum_q p_j do
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvinside.kernels.gpu.kernels import INTERPRETED, LOG2_E, _dot, _store
from rwkvinside.kernels.gpu.launch import Launch, run
from rwkvinside.kernels.gpu.table import Tuning

MODES = {torch.bfloat16: "bf16", torch.float16: "bf16x3", torch.float32: "bf16x6"}  # of products, by the dtype
COLUMNS = 512  # of a program that adds the far parts of gradients


class Tile(NamedTuple):
    """How many queries and keys a program holds at a time, and what Triton compiles it with.

    Attributes:
        block: of queries, and of keys; the same in all kernels.
        queries, keys: settings of the kernels with a program for each block of queries, of keys.
    """

    block: int
    queries: Tuning
    keys: Tuning


def tile(size: int, dtype: torch.dtype) -> Tile:
    """Return the tile for heads of a size, padded to a power of two: what spills nothing or little on sm_90."""
    if dtype == torch.bfloat16:
        return Tile(64 if size <= 128 else 32, Tuning(4, 2), Tuning(4 if size <= 64 else 8, 2))
    warps = 4 if size <= 64 else 8
    return Tile(32 if size <= 64 else 16, Tuning(warps, 1), Tuning(warps, 1))  # products of parts need more registers


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    window: int,
    sinks: int,
    *,
    softcap: float | None = None,
    far: tuple[Tensor, Tensor, Tensor] | None = None,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attend to the last tokens of a document, the own one included, and to its first.

    Args:
        q: (tokens, H, N), bf16, fp16 or fp32, N a multiple of 8 up to 256; scores are divided by sqrt(N).
        k, v: (tokens, G, N) in the dtype of q, head h reads h // (H / G).
        start: (tokens,) int64, index of the first token of each one's document; it never falls.
        window, sinks: W >= 1 and S >= 0.
        softcap: the c of scores c * tanh(score / c); None: scores as they are.
        far: key (H, N), bias (H,) and growth (H,): what lies beyond the window has the score
            q . key + bias + growth * log(count), and no soft cap. None: it has no part in the softmax.
        count: (tokens,) int64, tokens beyond the window; None: as many as have no place in it.

    Returns:
        Values (tokens, H, N) in the dtype of v, and with `far` the weight of what lies beyond, (tokens, H) fp32. Both
        carry gradient to all floating inputs; there is no second derivative.

    Raises:
        ValueError: shapes, dtypes or numbers that do not fit.
        RuntimeError: tensors that are not on a GPU, outside of Triton's interpreter.
    """
    _check(q, k, v, start, window, sinks, far, count)
    values, weight, _ = _attend(q, k, v, start, count, *(far or (None,) * 3), window, sinks, softcap or 0.0)
    return values, None if far is None else weight


@torch.library.custom_op("rwkvinside::window_triton", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    count: Tensor | None,
    far_key: Tensor | None,
    far_bias: Tensor | None,
    far_growth: Tensor | None,
    window: int,
    sinks: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    far = far_key, far_bias, far_growth
    launches, out = plan_attend(q, k, v, start, count, far, window, sinks, softcap)
    run(launches, q.device)
    return out


@_attend.register_fake
def _(q, k, v, start, count, far_key, far_bias, far_growth, window, sinks, softcap):
    return _outputs(q, v, far_key is not None)


@torch.library.custom_op("rwkvinside::window_triton_backward", mutates_args=())
def _attend_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    count: Tensor | None,
    far_key: Tensor | None,
    far_bias: Tensor | None,
    far_growth: Tensor | None,
    window: int,
    sinks: int,
    softcap: float,
    values: Tensor,
    lse: Tensor,
    dvalues: Tensor,
    dweight: Tensor | None,
) -> list[Tensor]:
    far = far_key, far_bias, far_growth
    forward = values, lse, dvalues, dweight
    launches, grads, sums = plan_attend_backward(q, k, v, start, count, far, window, sinks, softcap, *forward)
    run(launches, q.device)
    return grads if sums is None else [*grads, sums.sum(0)]


@_attend_backward.register_fake
def _(q, k, v, start, count, far_key, far_bias, far_growth, window, sinks, softcap, values, lse, dvalues, dweight):
    grads = [x.new_empty(x.shape) for x in (q, k, v)]
    return grads if far_key is None else [*grads, lse.new_empty(q.shape[1], q.shape[2] + 2)]


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.window, ctx.sinks, ctx.softcap = inputs
    values, _, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors, values, lse)


def _differentiate(ctx, dvalues, dweight, dlse):
    *tensors, values, lse = ctx.saved_tensors
    far = tensors[5:]
    dweight = None if far[0] is None else dweight
    settings = ctx.window, ctx.sinks, ctx.softcap
    dq, dk, dv, *sums = _attend_backward(*tensors, *settings, values, lse, dvalues, dweight)
    dfar: list[Tensor | None] = [None] * 3
    if sums:
        N = dq.shape[2]
        parts = sums[0][:, :N], sums[0][:, N], sums[0][:, N + 1]
        dfar = [part.to(x.dtype) for part, x in zip(parts, far, strict=True)]
    return dq, dk, dv, None, None, *dfar, None, None, None


_attend.register_autograd(_differentiate, setup_context=_setup)


def _outputs(q: Tensor, v: Tensor, far: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty values, weights of what lies beyond (of no elements without it), and sums of exponents."""
    tokens, H, N = q.shape
    per_query = q.new_empty(tokens, H, dtype=torch.float32)
    return v.new_empty(tokens, H, N), per_query if far else per_query[:0].clone(), torch.empty_like(per_query)


Far = tuple[Tensor | None, Tensor | None, Tensor | None]


def plan_attend(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor | None, far: Far, window: int, sinks: int,
    softcap: float,
) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """Return the launches of the forward, and values, weights and logarithms of sums; launch nothing.

    Meta tensors are enough. A softcap of 0 is none.
    """
    out = values, weight, lse = _outputs(q, v, far[0] is not None)
    call = _Call(q, k, v, start, count, far, window, sinks, softcap)
    args = {"out_": values, "weight_": None if far[0] is None else weight, "lse_": lse}
    return [call.launch(window_forward, call.H, args)], out


def plan_attend_backward(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor | None, far: Far, window: int, sinks: int,
    softcap: float, values: Tensor, lse: Tensor, dvalues: Tensor, dweight: Tensor | None,
) -> tuple[list[Launch], list[Tensor], Tensor | None]:  # fmt: skip
    """Return the launches of the backward, the gradients of q, k, v, and parts of those of `far`; launch nothing.

    The parts are (blocks, H, N + 2), of key, bias and growth; None without `far`.
    """
    call = _Call(q, k, v, start, count, far, window, sinks, softcap)
    H, N, G = q.shape[1], q.shape[2], call.G
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    delta = torch.empty_like(lse)
    sums = None if far[0] is None else lse.new_empty(call.blocks, H, N + 2)
    parts = [lse.new_empty(call.blocks, H, sinks * N) for _ in range(2)] if sinks else [None, None]
    totals = [lse.new_empty(call.blocks, G, sinks * N) for _ in range(2)] if sinks else [None, None]
    given = {**_strided("do", dvalues), "lse_": lse, "delta_": delta}
    by_query = {**given, "out_": values, "dweight_": None if dweight is None else dweight.contiguous()}
    by_query |= {"dq_": dq, "sums_": sums, "part_k_": parts[0], "part_v_": parts[1]}
    launches = [call.launch(window_backward_queries, H, by_query)]
    if sinks:
        launches.append(call.add_parts(parts, totals))
    by_key = {**given, "dk_": dk, "dv_": dv, "far_dk_": totals[0], "far_dv_": totals[1]}
    launches.append(call.launch(window_backward_keys, G, by_key))
    return launches, [dq, dk, dv], sums


class _Call:
    """What all launches of a call share."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor | None, far: Far, window: int, sinks: int,
        softcap: float,
    ):  # fmt: skip
        self.tokens, self.H, self.N = q.shape
        self.G, self.sinks = k.shape[1], sinks
        padded = max(16, triton.next_power_of_2(self.N))
        self.tile = tile(padded, q.dtype)
        self.block = self.tile.block
        self.blocks = triton.cdiv(self.tokens, self.block)
        self.start, self.window = start.contiguous(), window
        names = "far_key_", "far_bias_", "far_growth_"
        self.args: dict[str, Any] = {**_strided("q", q), **_strided("k", k), **_strided("v", v), "start_": self.start}
        self.args |= {name: None if x is None else x.contiguous() for name, x in zip(names, far, strict=True)}
        self.args |= {"count_": None if count is None else count.contiguous(), "TOKENS": self.tokens, "H": self.H}
        self.args |= {"WINDOW": window, "softcap": softcap}
        first = min(max(16, triton.next_power_of_2(sinks)), self.block)  # tokens of documents that are taken at a time
        self.constants = {"S": sinks, "SB": first, "R": self.H // self.G, "D": self.N, "K": padded}
        self.constants |= {"BLOCK": self.block, "CAPPED": softcap > 0, "MODE": MODES[q.dtype]}

    def launch(self, kernel: Any, heads: int, more: dict[str, Any]) -> Launch:
        """Return a launch of a program for each block of tokens and head."""
        taken = set(kernel.arg_names)
        args = {name: x for name, x in {**self.args, **more}.items() if name in taken}
        constants = {name: x for name, x in self.constants.items() if name in taken}
        tuning = self.tile.keys if kernel is window_backward_keys else self.tile.queries
        return Launch(kernel, (self.blocks * heads,), args, constants, tuning)

    def add_parts(self, parts: list[Tensor | None], totals: list[Tensor | None]) -> Launch:
        """Return the launch that adds the far parts of each document's first tokens, over its blocks and heads."""
        width = self.sinks * self.N
        firsts = self.start[:: self.block].contiguous()
        args = {"part_k_": parts[0], "part_v_": parts[1], "total_k_": totals[0], "total_v_": totals[1]}
        args |= {"first_": firsts, "end_": torch.searchsorted(firsts, firsts, right=True), "G": self.G}
        args |= {"WINDOW": self.window}
        columns = min(COLUMNS, triton.next_power_of_2(width))
        constants = {"WIDTH": width, "COLUMNS": columns, "R": self.H // self.G, "BLOCK": self.block}
        grid = (self.blocks * self.G, triton.cdiv(width, columns))
        return Launch(add_far_parts, grid, args, constants, Tuning(4, 2))


def _strided(name: str, x: Tensor) -> dict[str, Any]:
    x = x if x.stride(2) == 1 else x.contiguous()
    return {f"{name}_": x, f"{name}_t": x.stride(0), f"{name}_h": x.stride(1)}


def _check(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, window: int, sinks: int,
    far: tuple[Tensor, Tensor, Tensor] | None, count: Tensor | None,
) -> None:  # fmt: skip
    if q.dim() != 3 or q.shape[2] % 8 or not 8 <= q.shape[2] <= 256 or q.dtype not in MODES:
        raise ValueError(
            f"q has shape {tuple(q.shape)} and {q.dtype}, expected (tokens, H, N) with N a multiple of 8 from 8 to "
            "256, in bf16, fp16 or fp32"
        )
    (tokens, H, N), G = q.shape, k.shape[1]
    if not G or H % G:
        raise ValueError(f"k has shape {tuple(k.shape)}: its heads must divide the {H} of q")
    for name, x in (("k", k), ("v", v)):
        if x.shape != (tokens, G, N) or x.dtype != q.dtype:
            raise ValueError(f"{name} has shape {tuple(x.shape)} and {x.dtype}, expected {(tokens, G, N)}, {q.dtype}")
    for name, x in (("start", start), *((("count", count),) if count is not None else ())):
        if x.shape != (tokens,) or x.dtype != torch.int64:
            raise ValueError(f"{name} has shape {tuple(x.shape)} and {x.dtype}, expected {(tokens,)} of int64")
    if window < 1 or sinks < 0:
        raise ValueError(f"a window of {window} tokens and {sinks} first ones: expected at least 1 and 0")
    for name, x, shape in zip(("key", "bias", "growth"), far or (), ((H, N), (H,), (H,)), strict=False):
        if x.shape != shape or x.dtype == torch.float64:
            raise ValueError(f"far {name} has shape {tuple(x.shape)} and {x.dtype}, expected {shape} and not float64")
    if q.device.type != "cuda" and not INTERPRETED.value:
        raise RuntimeError(f"the Triton kernels need a CUDA device, q is on {q.device}")


@triton.jit
def _rows(x_, x_t, x_h, at, head, real, column, D: tl.constexpr):
    """Load rows of a tensor (tokens, heads, D)."""
    places = x_ + at.to(tl.int64)[:, None] * x_t + head.to(tl.int64) * x_h + column[None, :]
    return tl.load(places, mask=real[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def _scores(q, k, softcap, D: tl.constexpr, CAPPED: tl.constexpr, MODE: tl.constexpr):
    """Return the scores of queries and keys, softcap * tanh(score / softcap) where CAPPED."""
    scores = _dot(q, tl.trans(k), MODE) * (D**-0.5)
    if CAPPED:
        grown = tl.exp2(tl.abs(scores) * (-2.0 * LOG2_E / softcap))
        capped = softcap * (1.0 - grown) / (1.0 + grown)
        scores = tl.where(scores < 0, -capped, capped)
    return scores


@triton.jit
def _near(t, start, j, low, WINDOW, S: tl.constexpr):
    """Return which keys j from `low` on the queries t see: those of the window, and first ones of their document."""
    distance = t[:, None] - j[None, :]
    seen = distance < WINDOW
    if S > 0:
        seen = seen | (j[None, :] - start[:, None] < S)
    return seen & (distance >= 0) & (j[None, :] >= start[:, None]) & (j >= low)[None, :]


@triton.jit
def _add_keys(largest, total, out, scores, seen, v, MODE: tl.constexpr):
    """Take keys into running maxima, sums and values of a softmax."""
    scores = tl.where(seen, scores * LOG2_E, float("-inf"))
    highest = tl.maximum(largest, tl.max(scores, axis=1))
    finite = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(scores - finite[:, None])
    shrunk = tl.exp2(largest - finite)
    total = total * shrunk + tl.sum(weights, axis=1)
    return highest, total, out * shrunk[:, None] + _dot(weights, v, MODE)


@triton.jit
def _beyond(q, far_key_, far_bias_, far_growth_, counts, head, column, D: tl.constexpr):
    """Return the score of what lies beyond the window, base 2, -inf where nothing does; its key, and log(count)."""
    key = tl.load(far_key_ + head * D + column, mask=column < D, other=0.0).to(tl.float32)
    logarithm = tl.log(tl.maximum(counts, 1).to(tl.float32))
    score = tl.sum(q.to(tl.float32) * key[None, :], axis=1) + tl.load(far_bias_ + head).to(tl.float32)
    score += tl.load(far_growth_ + head).to(tl.float32) * logarithm
    return tl.where(counts > 0, score * LOG2_E, float("-inf")), key, logarithm


@triton.jit
def window_forward(
    q_, q_t, q_h, k_, k_t, k_h, v_, v_t, v_h, start_, count_, far_key_, far_bias_, far_growth_,
    out_, weight_, lse_, TOKENS, H, WINDOW, softcap,
    S: tl.constexpr, SB: tl.constexpr, R: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
    CAPPED: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Attend with a block of queries of one head."""
    head, begin = tl.program_id(0) % H, tl.program_id(0) // H * BLOCK
    t, column = begin + tl.arange(0, BLOCK), tl.arange(0, K)
    real = t < TOKENS
    start = tl.load(start_ + t, mask=real, other=TOKENS).to(tl.int32)
    first = tl.load(start_ + begin).to(tl.int32)
    q = _rows(q_, q_t, q_h, t, head, real, column, D)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    beyond = largest
    if far_key_ is not None:
        if count_ is not None:
            counts = tl.load(count_ + t, mask=real, other=0).to(tl.int32)
        else:
            counts = t - start + 1 - WINDOW - S
        beyond = _beyond(q, far_key_, far_bias_, far_growth_, counts, head, column, D)[0]
        largest = beyond
        total = tl.where(counts > 0, 1.0, 0.0)
    out = tl.zeros((BLOCK, K), tl.float32)
    before = begin - WINDOW
    if first < before:
        for s0 in range(0, S, SB):
            s = s0 + tl.arange(0, SB)
            far = (s < S) & (first + s < before)
            k = _rows(k_, k_t, k_h, first + s, head // R, far, column, D)
            v = _rows(v_, v_t, v_h, first + s, head // R, far, column, D)
            scores = _scores(q, k, softcap, D, CAPPED, MODE)
            seen = far[None, :] & (start == first)[:, None]
            largest, total, out = _add_keys(largest, total, out, scores, seen, v, MODE)
    low = tl.maximum(before, first)
    for at in range(low // BLOCK * BLOCK, begin + BLOCK, BLOCK):
        j = at + tl.arange(0, BLOCK)
        k = _rows(k_, k_t, k_h, j, head // R, j < TOKENS, column, D)
        v = _rows(v_, v_t, v_h, j, head // R, j < TOKENS, column, D)
        scores = _scores(q, k, softcap, D, CAPPED, MODE)
        seen = _near(t, start, j, low, WINDOW, S)
        largest, total, out = _add_keys(largest, total, out, scores, seen, v, MODE)
    total = tl.where(real, total, 1.0)
    lse = tl.where(real, largest, 0.0) + tl.log2(total)
    places = t.to(tl.int64) * H + head
    tl.store(lse_ + places, lse, mask=real)
    _store(out_ + places[:, None] * D + column[None, :], out / total[:, None], real[:, None] & (column < D)[None, :])
    if weight_ is not None:
        tl.store(weight_ + places, tl.exp2(beyond - lse), mask=real)


@triton.jit
def _backward(q, k, v, do, lse, delta, seen, softcap, D: tl.constexpr, CAPPED: tl.constexpr, MODE: tl.constexpr):
    """Return the weights of keys, and the gradient of their scores before a cap."""
    scores = _scores(q, k, softcap, D, CAPPED, MODE)
    weights = tl.where(seen, tl.exp2(scores * LOG2_E - lse[:, None]), 0.0)
    dscores = weights * (_dot(do, tl.trans(v), MODE) - delta[:, None])
    if CAPPED:
        dscores *= 1.0 - scores * scores / (softcap * softcap)
    return weights, dscores


@triton.jit
def window_backward_queries(
    q_, q_t, q_h, k_, k_t, k_h, v_, v_t, v_h, start_, count_, far_key_, far_bias_, far_growth_,
    do_, do_t, do_h, out_, dweight_, lse_, delta_, dq_, sums_, part_k_, part_v_, TOKENS, H, WINDOW, softcap,
    S: tl.constexpr, SB: tl.constexpr, R: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
    CAPPED: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a block of queries of one head, and what its far keys and the score's parameters get."""
    head, begin = tl.program_id(0) % H, tl.program_id(0) // H * BLOCK
    t, column = begin + tl.arange(0, BLOCK), tl.arange(0, K)
    real = t < TOKENS
    inside = real[:, None] & (column < D)[None, :]
    start = tl.load(start_ + t, mask=real, other=TOKENS).to(tl.int32)
    first = tl.load(start_ + begin).to(tl.int32)
    places = t.to(tl.int64) * H + head
    own = places[:, None] * D + column[None, :]
    q = _rows(q_, q_t, q_h, t, head, real, column, D)
    do = _rows(do_, do_t, do_h, t, head, real, column, D)
    out = tl.load(out_ + own, mask=inside, other=0.0)
    lse = tl.load(lse_ + places, mask=real, other=0.0)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), axis=1)
    dq = tl.zeros((BLOCK, K), tl.float32)
    if far_key_ is not None:
        if count_ is not None:
            counts = tl.load(count_ + t, mask=real, other=0).to(tl.int32)
        else:
            counts = t - start + 1 - WINDOW - S
        beyond, key, logarithm = _beyond(q, far_key_, far_bias_, far_growth_, counts, head, column, D)
        weight = tl.where(real, tl.exp2(beyond - lse), 0.0)
        dweight = tl.load(dweight_ + places, mask=real, other=0.0)
        delta += dweight * weight
        dscore = weight * (dweight - delta)
        sums_ += tl.program_id(0).to(tl.int64) * (D + 2)
        tl.store(sums_ + column, tl.sum(dscore[:, None] * q.to(tl.float32), axis=0), mask=column < D)
        tl.store(sums_ + D, tl.sum(dscore, axis=0))
        tl.store(sums_ + D + 1, tl.sum(dscore * logarithm, axis=0))
        dq += dscore[:, None] * key[None, :]
    tl.store(delta_ + places, delta, mask=real)
    before = begin - WINDOW
    if first < before:
        for s0 in range(0, S, SB):
            s = s0 + tl.arange(0, SB)
            far = (s < S) & (first + s < before)
            k = _rows(k_, k_t, k_h, first + s, head // R, far, column, D)
            v = _rows(v_, v_t, v_h, first + s, head // R, far, column, D)
            seen = far[None, :] & (start == first)[:, None]
            weights, dscores = _backward(q, k, v, do, lse, delta, seen, softcap, D, CAPPED, MODE)
            dscores *= D**-0.5
            dq += _dot(dscores, k, MODE)
            if part_k_ is not None:  # as it is where there are first tokens
                part = (tl.program_id(0).to(tl.int64) * S + s)[:, None] * D + column[None, :]
                kept = (s < S)[:, None] & (column < D)[None, :]
                tl.store(part_k_ + part, _dot(tl.trans(dscores), q, MODE), mask=kept)
                tl.store(part_v_ + part, _dot(tl.trans(weights), do, MODE), mask=kept)
    low = tl.maximum(before, first)
    for at in range(low // BLOCK * BLOCK, begin + BLOCK, BLOCK):
        j = at + tl.arange(0, BLOCK)
        k = _rows(k_, k_t, k_h, j, head // R, j < TOKENS, column, D)
        v = _rows(v_, v_t, v_h, j, head // R, j < TOKENS, column, D)
        seen = _near(t, start, j, low, WINDOW, S)
        dscores = _backward(q, k, v, do, lse, delta, seen, softcap, D, CAPPED, MODE)[1]
        dq += _dot(dscores * (D**-0.5), k, MODE)
    _store(dq_ + own, dq, inside)


@triton.jit
def add_far_parts(
    part_k_, part_v_, total_k_, total_v_, first_, end_, G, WINDOW,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add what the far queries of a document give its first tokens, in the program of its first block of such."""
    block = tl.program_id(0) // G
    first = tl.load(first_ + block).to(tl.int32)
    if block == (first + WINDOW) // BLOCK + 1:
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < WIDTH
        dk, dv = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
        place = tl.program_id(0).to(tl.int64) * R * WIDTH + column
        for _ in range(block, tl.load(end_ + block).to(tl.int32)):
            for head in tl.static_range(R):
                dk += tl.load(part_k_ + place + head * WIDTH, mask=inside, other=0.0)
                dv += tl.load(part_v_ + place + head * WIDTH, mask=inside, other=0.0)
            place += G * R * WIDTH
        place = tl.program_id(0).to(tl.int64) * WIDTH + column
        tl.store(total_k_ + place, dk, mask=inside)
        tl.store(total_v_ + place, dv, mask=inside)


@triton.jit
def window_backward_keys(
    q_, q_t, q_h, k_, k_t, k_h, v_, v_t, v_h, start_, do_, do_t, do_h, lse_, delta_, dk_, dv_, far_dk_, far_dv_,
    TOKENS, H, WINDOW, softcap,
    S: tl.constexpr, R: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, CAPPED: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a block of keys and values of the heads that share them."""
    G = H // R
    group, begin = tl.program_id(0) % G, tl.program_id(0) // G * BLOCK
    j, column = begin + tl.arange(0, BLOCK), tl.arange(0, K)
    real = j < TOKENS
    k = _rows(k_, k_t, k_h, j, group, real, column, D)
    v = _rows(v_, v_t, v_h, j, group, real, column, D)
    dk, dv = tl.zeros((BLOCK, K), tl.float32), tl.zeros((BLOCK, K), tl.float32)
    # queries of a block see keys from WINDOW tokens before the block on
    for at in range(begin, tl.minimum(begin + BLOCK + WINDOW, TOKENS), BLOCK):
        t = at + tl.arange(0, BLOCK)
        start = tl.load(start_ + t, mask=t < TOKENS, other=TOKENS).to(tl.int32)
        seen = _near(t, start, j, at - WINDOW, WINDOW, S)
        for shared in range(R):
            head = group * R + shared
            places = t.to(tl.int64) * H + head
            q = _rows(q_, q_t, q_h, t, head, t < TOKENS, column, D)
            do = _rows(do_, do_t, do_h, t, head, t < TOKENS, column, D)
            lse = tl.load(lse_ + places, mask=t < TOKENS, other=0.0)
            delta = tl.load(delta_ + places, mask=t < TOKENS, other=0.0)
            weights, dscores = _backward(q, k, v, do, lse, delta, seen, softcap, D, CAPPED, MODE)
            dv += _dot(tl.trans(weights), do, MODE)
            dk += _dot(tl.trans(dscores * (D**-0.5)), q, MODE)
    inside = real[:, None] & (column < D)[None, :]
    if S > 0:
        start = tl.load(start_ + j, mask=real, other=0).to(tl.int32)
        block = (start + WINDOW) // BLOCK + 1  # the first that has far queries of such a document, if it has any
        there = real & (j - start < S) & (block * BLOCK < TOKENS)
        there &= tl.load(start_ + block * BLOCK, mask=there, other=-1).to(tl.int32) == start
        place = ((block.to(tl.int64) * G + group) * S + (j - start))[:, None] * D + column[None, :]
        there = there[:, None] & inside
        dk += tl.load(far_dk_ + place, mask=there, other=0.0)
        dv += tl.load(far_dv_ + place, mask=there, other=0.0)
    own = (j.to(tl.int64) * G + group)[:, None] * D + column[None, :]
    _store(dk_ + own, dk, inside)
    _store(dv_ + own, dv, inside)
