"""RetNet: multi-scale retention (Sun et al. 2023, arXiv 2307.08621)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...modeling.time_mixer import rotate
from .attention import rotation
from .base import Mixer, Place, Shared, State, add_lengths, check_heads
from .linear_attention import linear_attention


class RetNet(Mixer):
    """Linear attention with a fixed decay per head, rotated keys, group norm and a swish gate.

    State: S (B, H, N, N), and the number of tokens (B,).

    Args:
        heads: H; head h decays by 1 - 2^(-5 - h) a token.
        d_tmd: width of the codes that modulate the gate; 0: none.
    """

    kind = "retnet"
    takes_codes = True

    def __init__(self, d_model: int, place: Place, *, heads: int = 8, d_tmd: int = 0):
        super().__init__()
        self.heads, self.head_size = heads, check_heads(d_model, heads)
        if self.head_size % 2:
            raise ValueError(f"heads={heads}: a head of {self.head_size} cannot be rotated, its width must be even")
        self.query, self.key, self.value, self.gate = (nn.Linear(d_model, d_model, bias=False) for _ in range(4))
        self.output = nn.Linear(d_model, d_model, bias=False)
        self.tmd_gate = nn.Linear(d_tmd, d_model, bias=False) if d_tmd else None
        if self.tmd_gate is not None:
            nn.init.zeros_(self.tmd_gate.weight)
        decay = torch.log1p(-(2.0 ** (-5 - torch.arange(heads, dtype=torch.float64))))
        self.register_buffer("log_decay", decay, persistent=False)

    def mix(self, x: Tensor, state: State | None, lengths: Tensor | None, shared: Shared) -> tuple[Tensor, State]:
        """Run the retention."""
        positions, count = add_lengths(state and state[1], x, lengths)
        cos, sin = rotation(positions, self.head_size, x.dtype)
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.query, self.key, self.value))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin) * self.head_size**-0.5
        decay = self.log_decay.to(x.dtype).expand(1, x.shape[1], self.heads)
        y, S = linear_attention(q, k, v, decay, state and state[0], lengths)
        gate = self.gate(x)
        if self.tmd_gate is not None and shared.tmd is not None:
            gate = gate + self.tmd_gate(shared.tmd.to(gate.dtype))[:, None]
        y = F.layer_norm(y, y.shape[-1:]).flatten(2).to(x.dtype) * F.silu(gate)
        return self.output(y), (S, count)
