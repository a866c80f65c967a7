"""Linear attention with a scalar decay per head and token: what Mamba-2, RetNet and Performer share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import fp32, real

CHUNK = 64


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T, y_t = S_t^T q_t, in chunks of `CHUNK` tokens.

    Within a chunk this is the masked attention of Dao and Gu 2024 (arXiv 2405.21060), section 6.

    Args:
        q, k: (B, T, H, N).
        v: (B, T, H, P).
        log_decay: (B or 1, T, H), at most 0; None: no decay.
        state: (B, H, N, P), None for zeros.
        lengths: (B,) tokens that count for the state; None: all.

    Returns:
        y (B, T, H, P), and the final state in fp32.
    """
    B, T, H, _ = q.shape
    q, k, v = fp32(q), fp32(k), fp32(v)
    decay = q.new_zeros(B, T, H) if log_decay is None else fp32(log_decay).expand(B, T, H)
    if lengths is not None:
        counts = real(lengths, T)[..., None]
        k, decay = k * counts[..., None], decay * counts
    S = q.new_zeros(B, H, k.shape[-1], v.shape[-1]) if state is None else state.to(q.dtype)
    outputs = []
    for start in range(0, T, CHUNK):
        part = slice(start, start + CHUNK)
        y, S = _chunk(q[:, part], k[:, part], v[:, part], decay[:, part], S)
        outputs.append(y)
    return torch.cat(outputs, 1), S


def _chunk(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """Run one chunk; shapes as of `linear_attention`."""
    total = log_decay.cumsum(1).transpose(1, 2)  # (B, H, C)
    C = total.shape[-1]
    ahead = torch.ones(C, C, dtype=torch.bool, device=q.device).triu(1)
    weights = (total[..., :, None] - total[..., None, :]).masked_fill(ahead, -torch.inf).exp()
    scores = torch.einsum("bihn,bjhn->bhij", q, k) * weights
    y = torch.einsum("bhij,bjhp->bihp", scores, v)
    y = y + torch.einsum("bihn,bhnp,bhi->bihp", q, S, total.exp())
    left = (total[..., -1:] - total).exp()  # (B, H, C)
    S = S * total[..., -1, None, None].exp() + torch.einsum("bjhn,bjhp,bhj->bhnp", k, v, left)
    return y, S


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor) -> Tensor:
    """Return the depthwise causal convolution of x (B, T, C) with weight (C, 1, K), after history (B, K - 1, C)."""
    padded = torch.cat([history.to(x.dtype), x], 1).transpose(1, 2)
    return F.conv1d(padded, weight, bias, groups=weight.shape[0]).transpose(1, 2)
