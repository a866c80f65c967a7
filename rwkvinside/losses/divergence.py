"""Divergences of a student q from a teacher p, with gradients in closed form.

Each takes log-probabilities and returns (value, slope): the value per row in nats, and its derivative with respect to
log q up to a multiple of q, which makes no difference to the logits. It overwrites `log_p`: rows are as long as a
vocabulary, and memory traffic is what this costs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NOTHING = -1e30  # logarithm of no mass; -inf would turn 0 times it into NaN


def forward_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(p || q), the sum of p (log p - log q), and its slope."""
    p = log_p.exp()
    value = log_p.sub_(log_q).mul_(p).sum(-1)
    return value, p.neg_()


def reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(q || p), the sum of q (log q - log p), and its slope."""
    slope = log_p.neg_().add_(log_q).mul_(log_q.exp())
    return slope.sum(-1), slope


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of KL(p || m) and KL(q || m), m = (p + q) / 2, and its slope.

    The value is at most log 2.
    """
    log_m = torch.logaddexp(log_p, log_q).sub_(math.log(2))
    p = log_p.exp()
    of_p = log_p.sub_(log_m).mul_(p).sum(-1)
    slope = log_m.neg_().add_(log_q).mul_(torch.exp(log_q, out=p)).mul_(0.5)
    return of_p.mul_(0.5).add_(slope.sum(-1)), slope


DIVERGENCES = {"forward": forward_kl, "reverse": reverse_kl, "js": jensen_shannon}


@dataclass(frozen=True)
class TeacherDistribution:
    """A teacher's distributions at n positions.

    Attributes:
        log_probs: (n, V) over the vocabulary; or (n, k + 1) over k of its tokens and all others together. May be
            overwritten.
        ids: (n, k) int64, which tokens these are, the likeliest first; None: all.
        best: (n,) int64, the likeliest token.
        vocab: the distributions are over the ids below this.
    """

    log_probs: Tensor
    ids: Tensor | None
    best: Tensor
    vocab: int

    def top(self, k: int | None) -> TeacherDistribution:
        """Return the k likeliest tokens by themselves and the rest as one event.

        None changes nothing. Overwrites `log_probs`.
        """
        tokens = self.log_probs.shape[1] - (self.ids is not None)
        if k is None or k >= tokens:
            return self
        if self.ids is None:
            top, ids = self.log_probs.topk(k)
            rest = self.log_probs.scatter_(-1, ids, -math.inf)
        else:
            top, ids, rest = self.log_probs[:, :k], self.ids[:, :k], self.log_probs[:, k:]
        return TeacherDistribution(torch.cat([top, rest.logsumexp(-1, keepdim=True)], -1), ids, self.best, self.vocab)


def divergence(kind: str, target: TeacherDistribution, log_q: Tensor, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Return the value summed over positions and the gradient of the student's logits.

    Args:
        kind: a name of `DIVERGENCES`.
        target: the teacher's distributions at the n positions; its log-probabilities are overwritten.
        log_q: (n, V) `log_softmax` of the logits; overwritten when the gradient is needed.
        need_grad: False: the gradient is None.
    """
    compare, log_p, ids = DIVERGENCES[kind], target.log_probs.clamp_(min=NOTHING), target.ids
    if ids is None:
        value, slope = compare(log_p, log_q)
        grad = slope.addcmul_(log_q.exp_(), slope.sum(-1, keepdim=True), value=-1) if need_grad else None
        return value.sum(), grad
    top = log_q.gather(-1, ids)
    rest = log_q.scatter_(-1, ids, -math.inf).logsumexp(-1, keepdim=True).clamp_(min=NOTHING)
    value, slope = compare(log_p, torch.cat([top, rest], -1))
    if not need_grad:
        log_q.scatter_(-1, ids, top)
        return value.sum(), None
    total, (of_top, of_rest) = slope.sum(-1, keepdim=True), slope.split([ids.shape[1], 1], -1)
    # the mass of the rest is shared among its tokens as q shares it
    grad = (log_q - rest).exp_().mul_(of_rest).addcmul_(log_q.exp_(), total, value=-1)
    return value.sum(), grad.scatter_(-1, ids, of_top - total * top.exp())
