"""Losses between predicted and true vectors, per prediction; sums and weights are the step's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine(y: Tensor, target: Tensor) -> Tensor:
    """Return 1 - cos(y, target) (N,) of vectors (N, d)."""
    return 1 - F.cosine_similarity(y, target, dim=-1)


def mse(y: Tensor, target: Tensor) -> Tensor:
    """Return the squared distance (N,) of vectors (N, d): of unit vectors 2 (1 - cos)."""
    return (y - target).pow(2).sum(-1)


def infonce(y: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Return the cross-entropy (N,) of each target among all N of them (van den Oord et al. 2018).

    Equal targets are not each other's negatives.
    """
    y, target = F.normalize(y, dim=-1), F.normalize(target, dim=-1)
    same = (target @ target.T) > 1 - 1e-6
    same.fill_diagonal_(False)
    scores = (y @ target.T / temperature).masked_fill(same, -torch.inf)
    return F.cross_entropy(scores, torch.arange(len(y), device=y.device), reduction="none")
