"""Mamba-2 (Dao and Gu 2024, arXiv 2405.21060), with the parameters of mamba_ssm and transformers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Mixer, Place, Shared, State, fp32, take
from .linear_attention import causal_conv, linear_attention


class GatedNorm(nn.Module):
    """RMS norm of x silu(gate), over each group by itself."""

    def __init__(self, width: int, groups: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.groups, self.eps = groups, eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Return the norm in the dtype of `gate`."""
        wide = (fp32(x) * F.silu(fp32(gate))).unflatten(-1, (self.groups, -1))
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.flatten(-2).to(gate.dtype) * self.weight


class Mamba2(Mixer):
    """State space duality with a scalar decay per head.

    State: S (B, H, N, P), and the last d_conv - 1 inputs of the convolution.

    Args:
        d_state: N.
        d_conv: taps of the convolution.
        expand: width of the heads together, times d_model.
        head_size: P.
        groups: heads share B and C within a group.
        d_tmd: width of the codes that shift dt ("TMD-conditional SSM"); 0: none.
    """

    kind = "mamba2"
    takes_codes = True
    dynamics = ("A_log", "dt_bias")

    def __init__(
        self,
        d_model: int,
        place: Place,
        *,
        d_state: int = 64,
        d_conv: int = 4,
        expand: int = 2,
        head_size: int = 64,
        groups: int = 1,
        d_tmd: int = 0,
        eps: float = 1e-5,
    ):
        super().__init__()
        width = expand * d_model
        head_size = min(head_size, width)
        if width % head_size or (width // head_size) % groups:
            raise ValueError(f"head_size={head_size} and groups={groups} do not divide expand * d_model = {width}")
        self.width, self.d_state, self.head_size, self.groups = width, d_state, head_size, groups
        self.heads = heads = width // head_size
        channels = width + 2 * groups * d_state
        self.in_proj = nn.Linear(d_model, width + channels + heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, d_conv, groups=channels)
        dt = torch.exp(torch.linspace(-6.9, -2.3, heads))  # 0.001 to 0.1
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        self.A_log = nn.Parameter(torch.log(torch.arange(1, heads + 1, dtype=torch.float32)))
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = GatedNorm(width, groups, eps)
        self.out_proj = nn.Linear(width, d_model, bias=False)
        self.tmd_dt = nn.Linear(d_tmd, heads, bias=False) if d_tmd else None
        if self.tmd_dt is not None:
            nn.init.zeros_(self.tmd_dt.weight)  # starts as plain Mamba-2

    def mix(self, x: Tensor, state: State | None, lengths: Tensor | None, shared: Shared) -> tuple[Tensor, State]:
        """Run convolution and state space."""
        B, T, _ = x.shape
        H, P, G, N = self.heads, self.head_size, self.groups, self.d_state
        gate, inner, dt = self.in_proj(x).split([self.width, self.width + 2 * G * N, H], -1)
        K = self.conv1d.kernel_size[0]
        history = inner.new_zeros(B, K - 1, inner.shape[-1]) if state is None else state[1].to(x.dtype)
        mixed = F.silu(causal_conv(inner, self.conv1d.weight, self.conv1d.bias, history))
        values, keys, queries = mixed.split([self.width, G * N, G * N], -1)
        if self.tmd_dt is not None and shared.tmd is not None:
            dt = dt + self.tmd_dt(shared.tmd.to(dt.dtype))[:, None]
        dt = F.softplus(fp32(dt) + fp32(self.dt_bias))
        values = fp32(values).unflatten(-1, (H, P))
        keys, queries = (part.unflatten(-1, (G, N)).repeat_interleave(H // G, 2) for part in (keys, queries))
        log_decay = -dt * fp32(self.A_log).exp()
        before = None if state is None else state[0]
        y, S = linear_attention(queries, keys, values * dt[..., None], log_decay, before, lengths)
        y = y + values * fp32(self.D)[:, None]
        y = self.out_proj(self.norm(y.flatten(2), gate))
        whole = torch.cat([history, inner], 1)
        end = torch.full((B,), T, device=x.device) if lengths is None else lengths
        return y, (S, fp32(take(whole, end[:, None] + torch.arange(K - 1, device=x.device))))
