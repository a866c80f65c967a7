"""Causal softmax attention with rotary positions and a cache of keys and values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...modeling.time_mixer import rotate
from .base import Mixer, Place, Shared, State, add_lengths, check_heads, fp32, real


def rotation(positions: Tensor, width: int, dtype: torch.dtype, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Return cos and sin (B, T, width) of rotary embeddings at positions (B, T), in the half-split layout."""
    frequencies = base ** (-torch.arange(0, width, 2, device=positions.device, dtype=torch.float64) / width)
    angles = (positions[..., None] * frequencies).repeat(1, 1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class Attention(Mixer):
    """Softmax attention (Vaswani et al. 2017) with rotary positions.

    State: keys and values (B, P, D), which of them are real (B, P), and the number of tokens (B,).

    Args:
        heads: of attention.
        window: attend to so many newest tokens only; 0: all.
        top_k: attend to the so many most similar tokens only ("sparse attention"); 0: all.
    """

    kind = "attention"
    recurrent = False

    def __init__(self, d_model: int, place: Place, *, heads: int = 8, window: int = 0, top_k: int = 0):
        super().__init__()
        self.heads, self.head_size = heads, check_heads(d_model, heads)
        if self.head_size % 2:
            raise ValueError(f"heads={heads}: a head of {self.head_size} cannot be rotated, its width must be even")
        self.window, self.top_k = window, top_k
        self.query, self.key, self.value, self.output = (nn.Linear(d_model, d_model, bias=False) for _ in range(4))

    def mix(self, x: Tensor, state: State | None, lengths: Tensor | None, shared: Shared) -> tuple[Tensor, State]:
        """Attend to earlier tokens and this one."""
        B, T, D = x.shape
        positions, count = add_lengths(state and state[3], x, lengths)
        cos, sin = rotation(positions, self.head_size, x.dtype)
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.query, self.key, self.value))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        valid = x.new_ones(B, T, dtype=torch.bool) if lengths is None else real(lengths, T)
        if state is not None:
            k, v = (
                torch.cat([old.to(x.dtype).unflatten(-1, (self.heads, -1)), new], 1)
                for old, new in ((state[0], k), (state[1], v))
            )
            valid = torch.cat([state[2], valid], 1)
        y = self._attend(q, k, v, valid)
        return self.output(y), (fp32(k.flatten(2)), fp32(v.flatten(2)), valid, count)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        """Return (B, T, D) for queries that are the newest tokens among the keys."""
        T, S = q.shape[1], k.shape[1]
        at, key = torch.arange(S - T, S, device=q.device)[:, None], torch.arange(S, device=q.device)
        allowed = valid[:, None, None] & (key <= at)
        if self.window:
            rank = valid.long().cumsum(1)  # of each token among the real ones
            age = rank[:, None, S - T :, None] - rank[:, None, None]
            allowed = allowed & (age < self.window)
        allowed = allowed | (key == at)  # padding sees itself: its outputs are dropped, but must be finite
        scores = torch.einsum("bihn,bjhn->bhij", q, k) * self.head_size**-0.5
        scores = scores.masked_fill(~allowed, -torch.inf)
        if self.top_k and self.top_k < S:
            least = scores.topk(self.top_k, -1).values[..., -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        return torch.einsum("bhij,bjhn->bihn", F.softmax(fp32(scores), -1).to(v.dtype), v).flatten(2)
