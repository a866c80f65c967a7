"""TMD codes: domain, task and modifier of a text, packed in 15 bits, and their 16-D vectors.

The fields are those of the study's authors: 16 domains (4 bits), 32 tasks (5), 64 modifiers (6). Their vectors mapped
code 0 to zero, which once made all of them useless; here no code is zero.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

DOMAINS, TASKS, MODIFIERS = 16, 32, 64
CODES = DOMAINS * TASKS * MODIFIERS
WIDTH = 16
SEED = 20251012


def pack(domain: Tensor, task: Tensor, modifier: Tensor) -> Tensor:
    """Return codes (int64) of domains, tasks and modifiers.

    Raises:
        ValueError: a field outside its range.
    """
    for name, values, limit in (("domain", domain, DOMAINS), ("task", task, TASKS), ("modifier", modifier, MODIFIERS)):
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < limit:
            raise ValueError(f"{name} must lie in 0 to {limit - 1}")
    return (domain.long() * TASKS + task.long()) * MODIFIERS + modifier.long()


def unpack(codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return domain, task and modifier of codes."""
    return codes // (TASKS * MODIFIERS), codes // MODIFIERS % TASKS, codes % MODIFIERS


@cache
def _table() -> Tensor:
    """Return unit vectors (CODES, WIDTH): bits as -1 and 1 and a constant, through a fixed random projection."""
    bits = (torch.arange(CODES)[:, None] >> torch.arange(15)) & 1
    signs = torch.cat([2.0 * bits - 1, torch.ones(CODES, 1)], 1)
    projection = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(SEED))
    return F.normalize(signs @ projection, dim=-1)


def vectors(codes: Tensor) -> Tensor:
    """Return the unit vectors (..., 16) of codes, fp32."""
    return _table()[codes.cpu()].to(codes.device)


def cluster_domains(vectors: Tensor, documents: Tensor, rounds: int = 20) -> Tensor:
    """Return a domain for every vector: k-means over the mean vectors of documents, the same for the same data.

    Args:
        vectors: (N, d), in the order of their documents.
        documents: (N,) ascending number of each vector's document.
        rounds: of k-means.
    """
    count = int(documents[-1]) + 1
    means = torch.zeros(count, vectors.shape[1]).index_add_(0, documents, vectors)
    means = F.normalize(means, dim=-1)
    k = min(DOMAINS, count)
    centers = means[torch.linspace(0, count - 1, k).long()]
    for _ in range(rounds):
        nearest = (means @ centers.T).argmax(1)
        sums = torch.zeros_like(centers).index_add_(0, nearest, means)
        centers = torch.where((sums.norm(dim=1) > 0)[:, None], F.normalize(sums, dim=-1), centers)
    return nearest[documents]
