"""Exact softmax attention to the last W tokens of a document and to its first S: beside a recurrence, or alone.

    a_t = softmax over { j : t - W < j <= t, or j < S } of q_t . k_j / sqrt(N), times v_j

j and t count the real tokens of one document; a score may have a soft cap, as Gemma 2's have. What lies beyond the
window may take part in that softmax as one more key, with a score of its own (`Beyond`) and without a value: the
window's values then weigh less, and its weight is handed to whoever has a value for it. `window_attention` is the door:
sequences go in blocks of queries, in O(T (W + S)) time and memory; single tokens read a ring of constant size.
On a GPU sequences run in the Triton kernel of `rwkvinside.kernels`, where that package is installed.
`dense_window_attention` is the reference. Nothing here asks the device for a number. This file travels with exported
models: torch only, no I/O.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .wkv7 import kernels, why_unavailable

BLOCKS = (64, 128)  # queries of a block: as many as the window has keys, within these, which measured fastest
SCORE_CHANNELS = 8  # of a score in a query: it needs two, kernels for GPUs want multiples of 8
LARGEST_IN_FP32 = 128  # head that the Triton kernel takes in fp32: products of larger ones do not fit into registers
NOTHING = -1000.0  # score of what lies beyond the window where nothing does; a bf16 or fp16 takes it, times sqrt(N)


class Beyond(NamedTuple):
    """What gives a query the score of what lies beyond its window: q . key + bias + growth * log(number of tokens).

    Attributes:
        key: (H, N).
        bias, growth: (H,).
    """

    key: Tensor
    bias: Tensor
    growth: Tensor

    def score(self, q: Tensor, count: Tensor) -> Tensor:
        """Return the score (B, T, H), in fp32 at least, of `count` (B, T) tokens for queries (B, T, H, N)."""
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        key, bias, growth = (x.to(dtype) for x in self)
        count = count[..., None].to(dtype)
        score = (q.to(dtype) * key).sum(-1) + bias + growth * count.clamp(min=1).log()
        return score.masked_fill(count <= 0, NOTHING)


class Attended(NamedTuple):
    """What a window gives.

    Attributes:
        values: (B, T, H, N), in the dtype of the values, weighed.
        beyond: (B, T, H, 1), the weight of what lies beyond the window; None where that has no score.
    """

    values: Tensor
    beyond: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> Attended:
        """Return what `change` makes of both."""
        return Attended(change(self.values), None if self.beyond is None else change(self.beyond))


class WindowState(NamedTuple):
    """Keys and values that a window needs of the tokens so far.

    Token p of the document (padding does not count) lies in slot p if p < S, else in slot S + (p - S) % W. So the slots
    that hold something are those below `seen`.

    Attributes:
        k, v: (B, G, S + W, N), normed and rotated keys, and values.
        seen: (B,) int64, real tokens so far.
    """

    k: Tensor
    v: Tensor
    seen: Tensor

    def tensors(self) -> list[Tensor]:
        """Return all tensors."""
        return list(self)

    def map(self, change: Callable[[Tensor], Tensor]) -> WindowState:
        """Return the state whose tensors are changed ones of this, which `change` sees in the order of `tensors`."""
        return WindowState(*(change(x) for x in self))


class Form(NamedTuple):
    """How to attend.

    Attributes:
        window, sinks: W >= 1 and S >= 0.
        softcap: the c of scores c * tanh(score / c); None: scores as they are.
        beyond: score of what lies beyond the window, without a soft cap; None: that has no part in the softmax.
    """

    window: int
    sinks: int
    softcap: float | None = None
    beyond: Beyond | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
        """Return softmax attention of q (..., queries, N) to the keys that are allowed, (..., keys, N).

        Where q has more channels than keys, these are the score of one more key, and so is the output's: its weight,
        zeros.
        """
        N = k.shape[-1]
        if (extra := q.shape[-1] - N) > 0:
            k, v, allowed = F.pad(k, (0, extra, 0, 1)), F.pad(v, (0, extra, 0, 1)), F.pad(allowed, (0, 1), value=True)
            k[..., -1, N : N + 2].fill_(1)
            v[..., -1, N].fill_(1)
        if self.softcap is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=N**-0.5)
        # no kernel of PyTorch has a soft cap
        scores = q @ k.mT * N**-0.5
        scores = scores if scores.dtype == torch.float64 else scores.float()
        capped = self.softcap * torch.tanh(scores / self.softcap)
        if extra > 0:  # in channels of few bits its score needs both
            score = q[..., N : N + 2].to(scores.dtype).sum(-1, keepdim=True) * N**-0.5
            capped = torch.cat([capped[..., :-1], score], -1)
        weights = capped.masked_fill(~allowed, torch.finfo(capped.dtype).min).softmax(-1)
        return weights.to(v.dtype) @ v


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    form: Form,
    *,
    state: WindowState | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    inplace: bool = False,
    keep_state: bool = True,
    backend: str = "auto",
) -> tuple[Attended, WindowState | None]:
    """Attend to the last tokens of a window, the own one included, and to the first of the document.

    Args:
        q: (B, T, H, N). It and k are cast to the dtype of v, in which everything is kept; softmax in fp32 at least.
        k, v: (B, T, G, N), head h reads h // (H / G).
        form: see there.
        state: of the tokens before, of each row, whose first document goes on from it; None at the start of documents.
        mask: (B, T) bool, True = real token, wherever the padding is; it is attended by nobody and gets zeros.
        cu_seqlens: (documents + 1,) bounds over the flattened B * T tokens, row ends included; None: a row each.
        inplace: a single token may be written into the memory of `state`.
        keep_state: whether somebody goes on from the state after the last token, which sequences make for that alone.
        backend: of `wkv7`. Sequences run in Triton where that is named, and where "auto" finds it on a GPU, if it takes
            them (`_runs_in_triton`); all else is PyTorch. A recurrence beside the window says what is missing.

    Returns:
        What was attended to, in the dtype of v, and the state of each row after the last token, which is of its last
        document; None with cu_seqlens and without a state, where no row goes on, and without `keep_state`.
    """
    if mask is not None:  # nothing behind the padding may come through, NaN times zero included
        q, k, v = (x.masked_fill(~mask[..., None, None], 0) for x in (q, k, v))
    single = q.shape[1] == 1 and cu_seqlens is None
    fused = not single and _runs_in_triton(backend, v)
    count = None
    if form.beyond is not None and (not fused or state is not None or mask is not None):
        count = _seen(q, state, mask, cu_seqlens) - form.window - form.sinks
        count = count if mask is None else count.masked_fill(~mask, 0)
    score = None if count is None or form.beyond is None or fused else form.beyond.score(q, count)
    q, k = q.to(v.dtype), k.to(v.dtype)
    q = q if score is None else _with_score(q, score)
    if single:
        return _step(q, k, v, state or empty_state(k, form.window + form.sinks), mask, form, inplace)
    queries, attend = ((q, count), _triton) if fused else ((q, None), _blocks)
    out = _sequences(queries, k, v, form, partial(attend, form=form), state, mask, cu_seqlens)
    return out, _state_after(k, v, form, state, mask, cu_seqlens) if keep_state else None


def _runs_in_triton(backend: str, v: Tensor) -> bool:
    if backend != "triton" and (backend != "auto" or v.device.type != "cuda"):
        return False
    if v.dtype == torch.float32 and v.shape[3] > LARGEST_IN_FP32:
        return False
    return why_unavailable("triton", v.device.type, v.dtype, v.shape[3]) is None


_Queries = tuple[Tensor, Tensor | None]  # and how many tokens lie beyond the window of each
_Attend = Callable[[_Queries, Tensor, Tensor, Tensor], Attended]
"""Queries, keys and values (tokens, heads, N), documents side by side, and the first index of each token's document."""


def _sequences(
    queries: _Queries,
    k: Tensor,
    v: Tensor,
    form: Form,
    attend: _Attend,
    state: WindowState | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Attended:
    """Attend as `window_attention` does, behind what the state holds."""
    if state is None:
        return _attend(queries, k, v, mask, cu_seqlens, attend)
    (B, T), past = k.shape[:2], form.window + form.sinks
    earlier_k, earlier_v, real = _in_order(state, form.window, form.sinks)
    joined = torch.cat([real, real.new_ones(B, T) if mask is None else mask], 1)
    q, count = (None if x is None else torch.cat([x.new_zeros(B, past, *x.shape[2:]), x], 1) for x in queries)
    assert q is not None
    out = _attend(
        (q, count),
        torch.cat([earlier_k.to(k.dtype), k], 1),
        torch.cat([earlier_v.to(v.dtype), v], 1),
        joined,
        None if cu_seqlens is None else _behind(cu_seqlens, past, B, T),
        attend,
    )
    return out.map(lambda x: x[:, past:])


def _state_after(
    k: Tensor,
    v: Tensor,
    form: Form,
    state: WindowState | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> WindowState | None:
    """Return the state of each row after the last token of sequences; arguments and None as of `window_attention`."""
    if state is None:
        if cu_seqlens is not None:
            return None
        state = empty_state(k, form.window + form.sinks)
    elif cu_seqlens is not None:
        state, mask = _of_last_documents(state, cu_seqlens, mask, *k.shape[:2])
    return _advance(state, k, v, mask, form.window, form.sinks)


def _with_score(q: Tensor, score: Tensor) -> Tensor:
    """Return q with the score (B, T, H) of one more key in more channels, for `Form.attend`.

    Where q has few bits, the second of them has what the first one rounds off.
    """
    N = q.shape[-1]
    score = score * N**0.5
    high = score.to(q.dtype)
    low = (score - high.to(score.dtype)).detach().to(q.dtype)
    return torch.cat([q, torch.stack([high, low], -1), q.new_zeros(*q.shape[:-1], SCORE_CHANNELS - 2)], -1)


def _starts(like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return the flattened index of the first token of each one's document, (B * T,), for rows like (B, T, ...)."""
    B, T = like.shape[:2]
    index = torch.arange(B * T, device=like.device)
    if cu_seqlens is None:
        return index // T * T
    bounds = cu_seqlens.long()
    return bounds[torch.searchsorted(bounds, index, right=True) - 1]


def _seen(like: Tensor, state: WindowState | None, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Return how many tokens of its document each token (B, T) has seen, itself included."""
    B, T = like.shape[:2]
    start = _starts(like, cu_seqlens)
    real = torch.ones_like(start) if mask is None else mask.flatten().long()
    count = real.cumsum(0)
    seen = (count - (count - real)[start]).view(B, T)
    if state is not None:  # the first document of a row began before it
        row = torch.arange(B, device=start.device)[:, None] * T
        seen = seen + torch.where(start.view(B, T) == row, state.seen[:, None], 0)
    return seen


def dense_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    form: Form,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Attended:
    """Return what `window_attention` does, from all (B T)^2 scores: the reference, arguments as there."""
    window, sinks, softcap, beyond = form
    (B, T, H, N), device = q.shape, q.device
    index = torch.arange(B * T, device=device)
    document = index // T if cu_seqlens is None else torch.searchsorted(cu_seqlens.long(), index, right=True)
    real = torch.ones_like(index, dtype=torch.bool) if mask is None else mask.flatten()
    same = document[:, None] == document
    position = (same & real & (index <= index[:, None])).sum(1)  # real tokens of the document up to this one
    distance = position[:, None] - position
    near = (distance >= 0) & (distance < window) | (position <= sinks) & (index <= index[:, None])
    allowed = same & near & real & real[:, None]
    q, k, v = (x.flatten(0, 1).transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(H // x.shape[0], 0) for x in (k, v))
    scores = q @ k.mT * N**-0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~allowed, -torch.inf)
    if beyond is not None:
        count = (position - window - sinks).clamp(min=0).view(B, T)
        score = beyond.score(q.transpose(0, 1).unflatten(0, (B, T)), count)
        scores = torch.cat([scores, score.flatten(0, 1).t()[..., None].to(scores.dtype)], -1)
    weights = scores.softmax(-1).masked_fill(~real[:, None], 0)  # padding has nothing to attend to
    values = (weights[..., : B * T] @ v).transpose(0, 1).unflatten(0, (B, T))
    return Attended(values, None if beyond is None else weights[..., B * T :].transpose(0, 1).unflatten(0, (B, T)))


def _attend(
    queries: _Queries, k: Tensor, v: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, attend: _Attend
) -> Attended:
    """Attend in one sequence of all B * T tokens, real ones first, each of which knows where its document starts."""
    (B, T), start = k.shape[:2], _starts(k, cu_seqlens)
    (q, count), k, v = (x if x is None else x.flatten(0, 1) for x in queries), k.flatten(0, 1), v.flatten(0, 1)
    assert q is not None
    if mask is None:
        return attend((q, count), k, v, start).map(lambda x: x.unflatten(0, (B, T)))
    real, index = mask.flatten(), torch.arange(B * T, device=q.device)
    seen = real.cumsum(0)
    place = torch.where(real, seen - 1, seen[-1] + index - seen)  # padding goes to the end
    start = torch.where(real, (seen - real.long())[start], place)  # where it attends to itself alone
    order = torch.empty_like(place).scatter_(0, place, index)
    q, k, v = (x.index_select(0, order) for x in (q, k, v))
    out = attend((q, None if count is None else count[order]), k, v, start[order])
    return out.map(lambda x: x.index_select(0, place).unflatten(0, (B, T)))


def _triton(queries: _Queries, k: Tensor, v: Tensor, start: Tensor, form: Form) -> Attended:
    """Attend by the kernel of `rwkvinside.kernels`."""
    window, sinks, softcap, beyond = form
    q, count = queries
    far = None if beyond is None else tuple(beyond)
    values, weight = kernels.window_attention(q, k, v, start, window, sinks, softcap=softcap, far=far, count=count)
    return Attended(values, None if weight is None else weight[..., None])


def block_size(window: int) -> int:
    """Return the number of queries in a block of PyTorch's path."""
    return min(max(window, BLOCKS[0]), BLOCKS[1])


def _blocks(queries: _Queries, k: Tensor, v: Tensor, start: Tensor, form: Form) -> Attended:
    """Attend in blocks of queries to the keys of the block, of the W tokens before it, and of the sinks before those.

    A block has one document at most that began before its keys: that of its first query. Only that one's first tokens
    have to be fetched. Queries may have more channels, see `Form.attend`.
    """
    q = queries[0]
    (tokens, H, channels), window, sinks = q.shape, form.window, form.sinks
    G = k.shape[1]
    size = block_size(window)
    blocks = -(-tokens // size)
    more = blocks * size - tokens
    start = F.pad(start.clamp(max=tokens), (0, more), value=tokens).view(blocks, size)
    allowed = _allowed(start, window, sinks)
    first = start[:, :1] + torch.arange(sinks, device=q.device)

    def keys(x: Tensor) -> Tensor:
        local = F.pad(x, (0, 0, 0, 0, window, more)).unfold(0, window + size, size).mT  # views, nothing is copied yet
        return local if sinks == 0 else torch.cat([local, x[first.clamp(max=tokens - 1)].transpose(1, 2)], 2)

    # the heads that share keys are more queries of the same keys: no kernel has to know of groups
    q = F.pad(q, (0, 0, 0, 0, 0, more)).view(blocks, size, G, H // G, channels).permute(0, 2, 3, 1, 4).flatten(2, 3)
    allowed = allowed[:, None].expand(-1, H // G, -1, -1).flatten(1, 2)[:, None]
    out = form.attend(q, keys(k), keys(v), allowed)
    out = out.unflatten(2, (H // G, size)).permute(0, 3, 1, 2, 4).reshape(-1, H, channels)[:tokens]
    return _parts(out, k.shape[2])


def _parts(out: Tensor, N: int) -> Attended:
    """Return the result of `Form.attend` as what it is: values, and in one more channel the weight of the score."""
    return Attended(out[..., :N], out[..., N : N + 1] if out.shape[-1] > N else None)


def _allowed(start: Tensor, window: int, sinks: int) -> Tensor:
    """Return which keys of `_blocks` each query attends to, (blocks, size, window + size + sinks) bool.

    Args:
        start: (blocks, size), of each query's document.
        window, sinks: as of `window_attention`.
    """
    blocks, size = start.shape
    query = torch.arange(blocks * size, device=start.device).view(blocks, size)
    position = (query - start)[..., None]
    distance = query[0, :, None] + window - torch.arange(window + size, device=start.device)
    near = (distance >= 0) & (distance < window) & (distance <= position)
    if sinks == 0:
        return near
    near |= (distance >= 0) & (distance <= position) & (distance > position - sinks)
    first = start[:, :1] + torch.arange(sinks, device=start.device)
    before = first < query[:, :1] - window
    far = before[:, None] & (start == start[:, :1])[..., None]
    return torch.cat([near, far], 2)


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: WindowState,
    mask: Tensor | None,
    form: Form,
    inplace: bool,
) -> tuple[Attended, WindowState]:
    """Attend with one token of each row, which first takes its slot."""
    window, sinks = form.window, form.sinks
    B, _, H, channels = q.shape
    G, slots, N = state.k.shape[1:]
    seen = state.seen
    slot = torch.where(seen < sinks, seen, sinks + (seen - sinks) % window)
    at = slot.view(B, 1, 1, 1).expand(B, G, 1, N)

    def put(held: Tensor, new: Tensor) -> Tensor:
        new = new.transpose(1, 2).to(held.dtype)
        if mask is not None:
            new = torch.where(mask[:, :, None, None], new, held.gather(2, at))
        return held.scatter_(2, at, new) if inplace else held.scatter(2, at, new)

    more = 1 if mask is None else mask[:, 0]
    state = WindowState(put(state.k, k), put(state.v, v), seen.add_(more) if inplace else seen + more)
    filled = torch.arange(slots, device=q.device) < state.seen.clamp(min=1)[:, None]
    out = form.attend(
        q.reshape(B, G, H // G, channels), state.k.to(q.dtype), state.v.to(q.dtype), filled[:, None, None]
    ).reshape(B, 1, H, channels)
    return _parts(out if mask is None else out.masked_fill(~mask[..., None, None], 0), N), state


def empty_state(k: Tensor, slots: int) -> WindowState:
    """Return the state before the first token, with slots for keys and values like k (B, T, G, N)."""
    B, _, G, N = k.shape
    held = k.new_zeros(2, B, G, slots, N)
    return WindowState(held[0], held[1], torch.zeros(B, dtype=torch.long, device=k.device))


def _in_order(state: WindowState, window: int, sinks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys and values (B, S + W, G, N) in the order of their tokens, and which are real (B, S + W).

    What lies between the sinks and the window is missing, and out of reach: no token that follows can tell.
    """
    steps = torch.arange(window, device=state.seen.device)
    ring = sinks + (state.seen[:, None] - sinks + steps) % window  # the oldest is the next to be replaced
    slots = torch.cat([torch.arange(sinks, device=ring.device).expand(ring.shape[0], -1), ring], 1)
    rows = torch.arange(slots.shape[0], device=slots.device)[:, None]
    return state.k[rows, :, slots], state.v[rows, :, slots], slots < state.seen[:, None]


def _behind(cu_seqlens: Tensor, past: int, B: int, T: int) -> Tensor:
    """Return the bounds of documents in B rows of `past` + T tokens: the former belong to a row's first document."""
    bounds = cu_seqlens.long()
    row, at = bounds // T, bounds % T
    return row * (past + T) + torch.where(at > 0, past + at, 0)


def _of_last_documents(
    state: WindowState, cu_seqlens: Tensor, mask: Tensor | None, B: int, T: int
) -> tuple[WindowState, Tensor]:
    """Return what the last document of each row goes on from, and which tokens (B, T) are its own."""
    bounds, row = cu_seqlens.long(), torch.arange(B, device=cu_seqlens.device) * T
    start = bounds[torch.searchsorted(bounds, row + T) - 1] - row  # of the last document, within its row
    own = torch.arange(T, device=start.device) >= start[:, None]
    seen = torch.where(start > 0, 0, state.seen)
    return state._replace(seen=seen), own if mask is None else own & mask


def _advance(state: WindowState, k: Tensor, v: Tensor, mask: Tensor | None, window: int, sinks: int) -> WindowState:
    """Return the state after further tokens (B, T, G, N)."""
    B, T = k.shape[:2]
    seen = state.seen + (T if mask is None else mask.sum(1))
    slot = torch.arange(sinks + window, device=k.device)
    last = seen[:, None] - 1
    position = torch.where(slot < sinks, slot, last - (last - slot) % window)  # of the token that a slot holds now
    new = (slot <= last) & (position >= state.seen[:, None])
    index = (position - state.seen[:, None]).clamp(0, T - 1)  # among the real tokens of this call
    if mask is not None:
        index = torch.searchsorted(mask.cumsum(1), index + 1).clamp(max=T - 1)
    rows = torch.arange(B, device=k.device)[:, None]

    def put(held: Tensor, x: Tensor) -> Tensor:
        values = torch.where(new[:, None, :, None], x[rows, index].transpose(1, 2).to(held.dtype), held)
        return values.contiguous()  # kernels write into it

    return WindowState(put(state.k, k), put(state.v, v), seen)
