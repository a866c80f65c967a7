"""Initial values of a time mixer's own parameters."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from .time_mixer import TimeMixer


@torch.no_grad()
def init_mixer(mixer: TimeMixer, layer: int, num_layers: int, init: str = "calibrated") -> None:
    """Set everything that is not copied from the teacher, in fp32.

    | parameter | published | calibrated |
    |---|---|---|
    | w0 | depth-dependent ramp + 2.5 zz | the same (the calibrate stage replaces it) |
    | a0 | -0.19 + 0.3 zz + 0.4 lin | the same |
    | v0, k0 | 0.73: 67.5 % of the first layer | -4: 1.8 % |
    | r_k | -0.04 | 0 |
    | mix_recurrence, mix_window | 1, 0 | 1, 0 |
    | w1, a1, v1, k1, g1 | 0 | 0 |
    | w2, a2, v2, k2 | orthogonal, gain 0.1 max(1, sqrt(rows / cols)) | the same |
    | g2 | the same orthogonal | and its columns sum to 2, so that the gate starts at 1 |
    | norms | 1 | 1 |

    Args:
        mixer: changed in place.
        layer: index in the model, which together with `num_layers` sets the ramp of w0.
        num_layers: of the model.
        init: "published" or "calibrated".

    Raises:
        ValueError: another `init`.
    """
    if init not in ("published", "calibrated"):
        raise ValueError(f"init is {init!r}, allowed: published, calibrated")
    c = mixer.mixer_config
    C, N = c.num_heads * c.head_size, c.head_size
    n = torch.arange(C, dtype=torch.float32)
    lin = n / max(C - 1, 1) - 0.5
    z = (n % N - (N - 1) / 2) / max((N - 1) / 2, 0.5)
    zz = z * z.abs()
    depth = layer / max(num_layers - 1, 1)
    values = {
        "w0": -6 + 6 * (n / max(C - 1, 1)) ** (1 + depth**0.3) + 0.5 + 2.5 * zz,
        "a0": -0.19 + 0.3 * zz + 0.4 * lin,
        "v0": 0.73 if init == "published" else -4.0,
        "k0": 0.73 if init == "published" else -4.0,
        "r_k": -0.04 if init == "published" else 0.0,
        "k_k": 0.85,
        "k_a": 1.0,
        "mix_recurrence": 1.0,
        "mix_window": 0.0,
    }
    for name, parameter in mixer.named_parameters():
        if name in values:
            parameter.copy_(torch.as_tensor(values[name]).expand(parameter.numel()).view_as(parameter))
        elif name in ("w1", "a1", "v1", "k1", "g1") or name.startswith("x_"):
            parameter.zero_()
        elif name in ("w2", "a2", "v2", "k2", "g2"):
            rows, cols = parameter.shape
            fresh = torch.empty(rows, cols)
            nn.init.orthogonal_(fresh, gain=0.1 * max(1, math.sqrt(rows / cols)))
            if name == "g2" and init == "calibrated":
                fresh += (2 - fresh.sum(0)) / rows
            parameter.copy_(fresh)
        elif name in ("r_norm.weight", "k_norm.weight", "ln_x.weight"):
            parameter.fill_(1)
        elif name == "ln_x.bias":
            parameter.zero_()
