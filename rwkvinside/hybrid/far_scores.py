"""What share of a teacher's attention lies beyond a window, fitted by a score per head.

A student whose recurrence stands in the softmax of its window (`window_mix` "softmax") weighs both as its teacher does
if it knows the partition function of all that has left the window. In calibration that is known from queries and keys,
and here it is fitted by what a mixer can compute of it: a product with the query, a bias, and the number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..modeling.mixer_presets import TimeMixerConfig

STEPS = 50  # of L-BFGS
RIDGE = 1e-3  # of weights, for features of size one; the error it stands next to is at most about one


class Attention(NamedTuple):
    """What attention reads in rows of documents.

    Attributes:
        q: (B, T, H, N), and
        k, v: (B, T, G, N), queries and keys normed and rotated.
        segment_ids: (B, T), 0 = padding, others a document of the row.
        weight: (B, T), of a token's squared error.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    segment_ids: Tensor
    weight: Tensor


class FarScore(NamedTuple):
    """The score of what lies beyond a window: q . key + bias + growth * log(number of tokens).

    Attributes:
        key: (H, N).
        bias, growth: (H,).
        share: (H,), of the attention that goes there, the mean over tokens that something lies beyond.
    """

    key: Tensor
    bias: Tensor
    growth: Tensor
    share: Tensor


class _Tokens(NamedTuple):
    """Tokens that something lies beyond, as every head sees them.

    Attributes:
        q: (H, tokens, N).
        near: (H, tokens), logarithm of the window's partition function.
        far: (H, tokens), of that of all else.
        count: (H, tokens), logarithm of the number of tokens beyond the window.
        weight: (H, tokens), of the share's squared error: the squared distance of what both sides give.
    """

    q: Tensor
    near: Tensor
    far: Tensor
    count: Tensor
    weight: Tensor


@torch.no_grad()
def fit_far_scores(c: TimeMixerConfig, rows: Iterable[Attention]) -> FarScore | None:
    """Fit the score of every head; None where no document is longer than the window.

    Minimized is the squared error of the share, weighed by how far apart the values on both sides are: what it does to
    a head's output.

    Args:
        c: of the mixer, with a window.
        rows: of a few thousand tokens.
    """
    every = [_tokens(c, Attention(*(x[b] for x in given))) for given in rows for b in range(len(given.q))]
    q, near, far, count, weight = (torch.cat(parts, 1) for parts in zip(*every, strict=True))
    if not q.shape[1]:
        return None
    tiny = torch.finfo(q.dtype).tiny
    share = torch.sigmoid(far - near)
    weight = weight / weight.sum(1, keepdim=True).clamp_min(tiny)
    mean = (weight * share).sum(1, keepdim=True)
    variance = (weight * (share - mean).square()).sum(1).clamp_min(tiny)
    size = (weight[..., None] * q.square()).sum(1).sqrt().clamp_min(tiny)  # (H, N)
    x = torch.cat([q / size[:, None], count[..., None]], 2)

    # the bias begins where the score is right on average, weighed by how much it moves the share
    moves = weight * share * (1 - share) + tiny
    bias = (moves * (far - count)).sum(1) / moves.sum(1)
    change = torch.zeros(x.shape[0], x.shape[2] + 1, dtype=q.dtype, device=q.device, requires_grad=True)

    def score() -> Tensor:
        return torch.einsum("htf,hf->ht", x, change[:, :-1]) + count + (bias + change[:, -1])[:, None]

    optimizer = torch.optim.LBFGS([change], max_iter=STEPS, line_search_fn="strong_wolfe")

    @torch.enable_grad()
    def closure() -> Tensor:
        optimizer.zero_grad()
        error = (weight * (torch.sigmoid(score() - near) - share).square()).sum(1) / variance
        loss = error.sum() + RIDGE * change[:, :-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    fitted = change.detach()
    return FarScore(fitted[:, :-2] / size, bias + fitted[:, -1], 1 + fitted[:, -2], share.mean(1))


def _tokens(c: TimeMixerConfig, row: Attention) -> _Tokens:
    """Return the tokens of one row (the fields of `row` without B), from the scores of all T x T pairs."""
    q, k, v, segments, weight = row
    T = len(segments)
    index = torch.arange(T, device=q.device)
    seen = (segments[:, None] == segments) & (index <= index[:, None]) & (segments > 0)
    position = seen.sum(1)  # in its document, from 1
    near = seen & ((index[:, None] - index < c.window) | (position <= c.sinks))
    far = seen & ~near
    rows = far.any(1)
    near, far, count = near[rows], far[rows], far[rows].sum(1).to(q.dtype).log()
    parts = []
    for g in range(c.num_kv_heads):  # a group at a time: the pairs of all heads are many
        heads = q.unflatten(1, (c.num_kv_heads, -1))[rows, g].transpose(0, 1)  # (H / G, tokens, N)
        scores = heads @ k[:, g].t() * c.head_size**-0.5
        scores = scores if c.softcap is None else c.softcap * torch.tanh(scores / c.softcap)
        sides = [scores.masked_fill(~allowed, -torch.inf) for allowed in (near, far)]
        first, second = (side.softmax(-1) @ v[:, g] for side in sides)
        sums = [side.logsumexp(-1) for side in sides]
        apart = (first - second).square().sum(-1) * weight[rows]
        parts.append(_Tokens(heads, *sums, count.expand_as(apart), apart))
    return _Tokens(*(torch.cat(x) for x in zip(*parts, strict=True)))
