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
LEAST_VARIANCE = 1e-6  # of a head's shares, so that one whose shares are all alike does not outweigh the others
LEAST_SCORE = -20.0  # of the far tokens next to the near ones: a share of nothing would have a score of minus infinity
QUERIES = 256  # whose pairs with all keys are in memory at a time


class Attention(NamedTuple):
    """What attention reads in rows of documents.

    Attributes:
        q: (B, T, H, N), and
        k, v: (B, T, G, N), queries and keys normed and rotated.
        segment_ids: (B, T), 0 = padding, others a document of the row, whose tokens are neighbors.
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
        score: (H, tokens), what gives the teacher's share to what lies beyond the window.
        count: (H, tokens), logarithm of the number of tokens beyond the window.
        weight: (H, tokens), of the share's squared error: the squared distance of what both sides give.
    """

    q: Tensor
    near: Tensor
    score: Tensor
    count: Tensor
    weight: Tensor


@torch.no_grad()
def fit_far_scores(c: TimeMixerConfig, rows: Iterable[Attention], own: int | None = None) -> FarScore | None:
    """Fit the score of every head; None where no document is longer than the window.

    Minimized is the squared error of the share, weighed by how far apart the values on both sides are: what it does to
    a head's output.

    Args:
        c: of the mixer, with a window.
        rows: of a few thousand tokens.
        own: how many tokens the teacher's attention sees, a token itself included; None: all before it.
    """
    every = [_tokens(c, Attention(*(x[b] for x in given)), own) for given in rows for b in range(len(given.q))]
    q, near, target, count, weight = (torch.cat(parts, 1) for parts in zip(*every, strict=True))
    if not q.shape[1]:
        return None
    tiny = torch.finfo(q.dtype).tiny
    share = torch.sigmoid(target - near)
    total = weight.sum(1, keepdim=True)
    # where both sides give the same, as in a head without values, any share is as good: fitted is the teacher's
    weight = torch.where(total > 0, weight / total.clamp_min(tiny), 1 / weight.shape[1])
    mean = (weight * share).sum(1, keepdim=True)
    variance = (weight * (share - mean).square()).sum(1).clamp_min(LEAST_VARIANCE)
    size = (weight[..., None] * q.square()).sum(1).sqrt().clamp_min(tiny)  # (H, N)
    x = torch.cat([q / size[:, None], count[..., None]], 2)

    # the bias begins where the score is right on average, weighed by how much it moves the share
    moves = weight * share * (1 - share) + tiny
    bias = (moves * (target - count)).sum(1) / moves.sum(1)
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


def _tokens(c: TimeMixerConfig, row: Attention, own: int | None) -> _Tokens:
    """Return the tokens of one row (the fields of `row` without B), from the scores of all pairs."""
    q, k, v, segments, weight = row
    index = torch.arange(len(segments), device=q.device)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[1:] = segments[1:] != segments[:-1]
    position = index - torch.where(begins, index, 0).cummax(0).values  # in its document, from 0
    blocks = []
    for first in range(0, len(segments), QUERIES):
        queries, keys = slice(first, first + QUERIES), slice(0, first + QUERIES)
        distance = index[queries, None] - index[keys]
        seen = (segments[queries, None] == segments[keys]) & (distance >= 0) & (segments[keys] > 0)
        near = seen & ((distance < c.window) | (position[keys] < c.sinks))
        far = seen & ~near
        rows = far.any(1)
        near, far, distance = near[rows], far[rows], distance[rows]
        count = far.sum(1).to(q.dtype).log()
        # what the student's window sees of it and what not, of what the teacher sees
        inside, outside = (near, far) if own is None else (near & (distance < own), far & (distance < own))
        heads = []
        for g in range(c.num_kv_heads):  # a group at a time: the pairs of all heads are many
            x = q[queries].unflatten(1, (c.num_kv_heads, -1))[rows, g].transpose(0, 1)  # (H / G, tokens, N)
            scores = x @ k[keys, g].t() * c.head_size**-0.5
            scores = scores if c.softcap is None else c.softcap * torch.tanh(scores / c.softcap)
            window, *sides = (_attend(scores, allowed, v[keys, g]) for allowed in (near, inside, outside))
            (here, first_values), (beyond, second_values) = sides
            apart = (first_values - second_values).square().sum(-1) * weight[queries][rows]
            score = window[0] + (beyond - here).clamp_min(LEAST_SCORE)
            heads.append(_Tokens(x, window[0], score, count.expand_as(apart), apart))
        blocks.append(_Tokens(*(torch.cat(parts) for parts in zip(*heads, strict=True))))
    return _Tokens(*(torch.cat(parts, 1) for parts in zip(*blocks, strict=True)))


def _attend(scores: Tensor, allowed: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logarithm of the partition function of what is allowed, and its mean value; of nothing -inf and 0."""
    scores = scores.masked_fill(~allowed, -torch.inf)
    total = scores.logsumexp(-1)
    weights = torch.exp(scores - total.masked_fill(total == -torch.inf, 0)[..., None])
    return total, weights @ v
