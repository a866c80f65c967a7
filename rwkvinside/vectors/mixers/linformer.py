"""Linformer (Wang et al. 2020, arXiv 2006.04768): keys and values projected along the sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Mixer, Place, Shared, State, check_heads, real


class Linformer(Mixer):
    """Attention to k mixtures of all tokens: not causal by construction, so it predicts from the last position only.

    Args:
        heads: of attention.
        k: mixtures, at most max_len.
        max_len: longest sequence; longer ones are refused.
        learned: train the projection; otherwise it stays random.
        d_tmd: width of the codes that scale the mixtures ("concept-aware projection"); 0: none.
    """

    kind = "linformer"
    takes_codes = True
    causal = False
    recurrent = False

    def __init__(
        self,
        d_model: int,
        place: Place,
        *,
        heads: int = 8,
        k: int = 16,
        max_len: int = 64,
        learned: bool = True,
        d_tmd: int = 0,
    ):
        super().__init__()
        check_heads(d_model, heads)
        if not 1 <= k <= max_len:
            raise ValueError(f"k={k} with max_len={max_len}: k mixtures of at most max_len tokens")
        self.heads, self.max_len = heads, max_len
        self.query, self.key, self.value, self.output = (nn.Linear(d_model, d_model, bias=False) for _ in range(4))
        self.project = nn.Parameter(torch.randn(k, max_len) * k**-0.5, requires_grad=learned)
        self.tmd_scale = nn.Linear(d_tmd, k, bias=False) if d_tmd else None
        if self.tmd_scale is not None:
            nn.init.zeros_(self.tmd_scale.weight)
        self.positions = nn.Parameter(torch.randn(max_len, d_model) * 0.02)

    def mix(self, x: Tensor, state: State | None, lengths: Tensor | None, shared: Shared) -> tuple[Tensor, None]:
        """Attend to the mixtures."""
        T = x.shape[1]
        if self.max_len < T:
            raise ValueError(f"{T} vectors are more than linformer's max_len={self.max_len}: raise max_len")
        x = x + self.positions[:T].to(x.dtype)
        q, k, v = (f(x) for f in (self.query, self.key, self.value))
        if lengths is not None:
            counts = real(lengths, T)[..., None].to(x.dtype)
            k, v = k * counts, v * counts
        k, v = (torch.einsum("kt,btd->bkd", self.project[:, :T], part) for part in (k, v))
        if self.tmd_scale is not None and shared.tmd is not None:
            scale = 1 + self.tmd_scale(shared.tmd.to(x.dtype))[..., None]
            k, v = k * scale, v * scale
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        return self.output(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), None
