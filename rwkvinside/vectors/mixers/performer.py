"""Performer: FAVOR+ (Choromanski et al. 2021, arXiv 2009.14794), without the leak of its public causal versions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Mixer, Place, Shared, State, check_heads, fp32
from .linear_attention import linear_attention


class Performer(Mixer):
    """Softmax attention estimated with positive random features.

    Queries and keys are RMS-normed, which bounds the exponents: no maximum over time has to be subtracted, through
    which the future would reach the past (performer-pytorch, issue 82). State: (B, H, M, N + 1), the last column is the
    normalizer.

    Args:
        heads: of attention.
        features: M random features of a head.
        orthogonal: features orthogonal in blocks of N, or independent.
        learned: train the features.
    """

    kind = "performer"

    def __init__(
        self,
        d_model: int,
        place: Place,
        *,
        heads: int = 8,
        features: int = 128,
        orthogonal: bool = True,
        learned: bool = False,
    ):
        super().__init__()
        self.heads, self.head_size = heads, check_heads(d_model, heads)
        self.query, self.key, self.value, self.output = (nn.Linear(d_model, d_model, bias=False) for _ in range(4))
        drawn = random_features(features, self.head_size, orthogonal)
        self.features = nn.Parameter(drawn, requires_grad=learned)

    def mix(self, x: Tensor, state: State | None, lengths: Tensor | None, shared: Shared) -> tuple[Tensor, State]:
        """Attend through the features."""
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.query, self.key, self.value))
        q, k = self._map(q), self._map(k)
        v = F.pad(fp32(v), (0, 1), value=1.0)
        y, S = linear_attention(q, k, v, None, state and state[0], lengths)
        y = y[..., :-1] / y[..., -1:].clamp(min=1e-6)
        return self.output(y.flatten(2).to(x.dtype)), (S,)

    def _map(self, x: Tensor) -> Tensor:
        """Return exp(w x - |x|^2 / 2) / sqrt(M), (B, T, H, M)."""
        x = F.rms_norm(fp32(x), x.shape[-1:]) * self.head_size**-0.25
        dots = x @ fp32(self.features).T
        return torch.exp(dots - x.pow(2).sum(-1, keepdim=True) / 2) * len(self.features) ** -0.5


def random_features(M: int, N: int, orthogonal: bool) -> Tensor:
    """Return M random directions (M, N) with the lengths of normal vectors."""
    if not orthogonal:
        return torch.randn(M, N)
    blocks = [torch.linalg.qr(torch.randn(N, N))[0].T for _ in range(-(-M // N))]
    return torch.cat(blocks)[:M] * torch.randn(M, N).norm(dim=1, keepdim=True)
