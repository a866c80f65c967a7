"""Hyena (Poli et al. 2023, arXiv 2302.10866): gates and long convolutions with filters that a network describes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .base import HistoryMixer, Place
from .linear_attention import causal_conv
from .s4 import fft_conv


class Hyena(HistoryMixer):
    """Order-N Hyena; it has no recurrent form, so its state is the history.

    Args:
        order: number of projections besides the value; order - 1 long convolutions.
        l_max: longest sequence; longer ones are refused, not cut.
        filter_width: of the network that describes the filters.
        bands: frequencies of its input.
        reach: part of l_max that the filters fade over; a list of them gives every layer a scale of its own.
    """

    kind = "hyena"

    def __init__(
        self,
        d_model: int,
        place: Place,
        *,
        order: int = 2,
        l_max: int = 1024,
        filter_width: int = 64,
        bands: int = 4,
        reach: float = 1.0,
    ):
        super().__init__()
        if order < 2 or reach <= 0:
            raise ValueError(f"order={order}, reach={reach}: order is at least 2, reach more than 0")
        self.order, self.l_max, self.width = order, l_max, d_model
        self.inputs = nn.Linear(d_model, (order + 1) * d_model)
        self.short = nn.Conv1d((order + 1) * d_model, (order + 1) * d_model, 3, groups=(order + 1) * d_model)
        self.filter_in = nn.Linear(1 + 2 * bands, filter_width)
        self.filter_mid = nn.Linear(filter_width, filter_width)
        self.filter_out = nn.Linear(filter_width, (order - 1) * d_model, bias=False)
        self.frequency = nn.Parameter(torch.full((filter_width,), 10.0))
        self.skip = nn.Parameter(torch.randn(order - 1, d_model))
        self.output = nn.Linear(d_model, d_model)
        t = torch.arange(l_max, dtype=torch.float64) / max(l_max - 1, 1)
        turns = 2 * math.pi * torch.linspace(1e-4, bands - 1, bands, dtype=torch.float64) * t[:, None]
        self.register_buffer("positions", torch.cat([t[:, None], turns.cos(), -turns.sin()], 1), persistent=False)
        rates = torch.linspace(math.log(1e-2) / 1.5, math.log(1e-2) / 0.3, d_model, dtype=torch.float64)
        self.register_buffer("window", torch.exp(rates / reach * t[:, None]), persistent=False)  # (l_max, D)

    def run(self, x: Tensor) -> Tensor:
        """Run gates and convolutions over whole rows."""
        B, T, D = x.shape
        if self.l_max < T:
            raise ValueError(f"{T} vectors are more than hyena's l_max={self.l_max}: raise l_max")
        inner = self.inputs(x)
        inner = causal_conv(inner, self.short.weight, self.short.bias, inner.new_zeros(B, 2, inner.shape[-1]))
        first, *gates, value = inner.transpose(1, 2).split(D, 1)
        kernels = self._filters(T, x.dtype)
        for i, gate in enumerate(reversed(gates)):
            value = value * gate
            value = fft_conv(value, kernels[i]) + value * self.skip[i, :, None]
        return self.output((value * first).transpose(1, 2))

    def _filters(self, T: int, dtype: torch.dtype) -> Tensor:
        """Return the filters (order - 1, D, T)."""
        z = self.positions[:T].to(dtype)
        h = torch.sin(self.frequency * self.filter_in(z))
        h = torch.sin(self.frequency * self.filter_mid(h))
        filters = self.filter_out(h).unflatten(-1, (self.order - 1, self.width)).permute(1, 2, 0)
        return filters * self.window[:T].T.to(dtype)
