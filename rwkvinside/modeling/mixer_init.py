"""Initial values of a time mixer's parameters: beside what is copied from a teacher, or from nothing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .mixer_presets import TimeMixerConfig
    from .time_mixer import TimeMixer

# Token shift: a channel at the fraction c of the width takes 1 - c ** (exponent * (1 - layer / layers)) of the token
# before. So the first channels of the first layers look back most.
SHIFT_EXPONENTS = {"x_r": 0.2, "x_w": 0.9, "x_k": 0.7, "x_v": 0.7, "x_a": 0.9, "x_g": 0.2}
# of orthogonal projections that copy nothing; keys are small, as the state first has to learn what to keep
GAINS = {"receptance.weight": 1.0, "key.weight": 0.1, "value.weight": 1.0, "output.weight": 0.0}


@torch.no_grad()
def init_mixer(
    mixer: TimeMixer, layer: int, num_layers: int, init: str = "calibrated", shift_ratio: float = 1.0
) -> None:
    """Set everything that is not copied from a teacher, in fp32.

    | parameter | published | calibrated | scratch |
    |---|---|---|---|
    | w0 | depth-dependent ramp + 2.5 zz | the same (the calibrate stage replaces it) | the same |
    | a0 | -0.19 + 0.3 zz + 0.4 lin | the same | the same |
    | v0, k0 | 0.73: 67.5 % of the first layer | -4: 1.8 % | 0.73 - 0.4 lin |
    | r_k | -0.04 | 0 | -0.04 |
    | k_k, k_a | 0.85, 1 | the same | 0.71 - 0.1 lin, 1.02 |
    | mix_recurrence, mix_window | 1, 0 (softmax: 1, 1) | 1, 0 (1, 1) | 1, 1 |
    | far_key, far_bias, far_growth | 0, 0, 1 | 0, 0, 1 | 0, 0, 1 |
    | w1, a1, v1, k1, g1 | 0 | 0 | 0 |
    | w2, a2, v2, k2 | orthogonal, gain 0.1 max(1, sqrt(rows / cols)) | the same | the same |
    | g2 | the same orthogonal | and its columns sum to 2, so that the gate starts at 1 | as published |
    | token shift | 0 | 0 | by channel and depth, see `SHIFT_EXPONENTS` |
    | projections | copied | copied | orthogonal, see `GAINS`; the output's 0; their biases 0 |
    | norms | 1 | 1 | 1; ln_x ((layer + 1) / layers)^0.7 |

    "scratch" is what RWKV-7's own training code does for models that are trained from nothing (x070 of
    github.com/BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/model.py); what that mixer does not have follows its ideas.

    Args:
        mixer: changed in place.
        layer: index in the model, which together with `num_layers` sets what depends on the depth.
        num_layers: of the model.
        init: "published" or "calibrated", for mixers whose projections are copied from a teacher, or "scratch".
        shift_ratio: of scratch: share of the token shift that it begins with; 0: none.

    Raises:
        ValueError: another `init`.
    """
    if init not in ("published", "calibrated", "scratch"):
        raise ValueError(f"init is {init!r}, allowed: published, calibrated, scratch")
    scratch = init == "scratch"
    values = _constants(mixer.mixer_config, layer, num_layers, init)
    share = -4.0 if init == "calibrated" else 0.73
    for name, parameter in mixer.named_parameters():
        if name in values:
            parameter.copy_(torch.as_tensor(values[name]).expand(parameter.numel()).view_as(parameter))
        elif name in ("v0", "k0"):
            parameter.copy_((share - 0.4 * scratch * _ramp(parameter.numel())).view_as(parameter))
        elif name in SHIFT_EXPONENTS:
            channel = torch.arange(parameter.numel()) / parameter.numel()
            mixed = 1 - channel ** (SHIFT_EXPONENTS[name] * (1 - layer / num_layers))
            parameter.copy_((shift_ratio * scratch * mixed).view_as(parameter))
        elif name in ("w1", "a1", "v1", "k1", "g1") or scratch and name.endswith(".bias"):
            parameter.zero_()
        elif name in ("w2", "a2", "v2", "k2", "g2"):
            rows, cols = parameter.shape
            fresh = orthogonal(rows, cols, 0.1 * max(1, math.sqrt(rows / cols)))
            if name == "g2" and init == "calibrated":
                fresh += (2 - fresh.sum(0)) / rows
            parameter.copy_(fresh)
        elif scratch and name in GAINS:
            parameter.copy_(orthogonal(parameter.shape[0], parameter.shape[1], GAINS[name]))


def _constants(config: TimeMixerConfig, layer: int, num_layers: int, init: str) -> dict[str, Tensor | float]:
    """Return what is not drawn, by parameter: a number, or one for each channel of the heads; see `init_mixer`."""
    scratch = init == "scratch"
    C, N = config.num_heads * config.head_size, config.head_size
    n = torch.arange(C, dtype=torch.float32)
    z = (n % N - (N - 1) / 2) / max((N - 1) / 2, 0.5)
    zz = z * z.abs()
    depth = layer / max(num_layers - 1, 1)
    return {
        "w0": -6 + 6 * (n / max(C - 1, 1)) ** (1 + depth**0.3) + 0.5 + 2.5 * zz,
        "a0": -0.19 + 0.3 * zz + 0.4 * _ramp(C),
        "r_k": 0.0 if init == "calibrated" else -0.04,
        "k_k": 0.71 - 0.1 * _ramp(C) if scratch else 0.85,
        "k_a": 1.02 if scratch else 1.0,
        "mix_recurrence": 1.0,
        "mix_window": 1.0 if scratch or config.window_mix == "softmax" else 0.0,
        "far_key": 0.0,
        "far_bias": 0.0,
        "far_growth": 1.0,
        "ln_x.weight": ((layer + 1) / num_layers) ** 0.7 if scratch else 1.0,
        "ln_x.bias": 0.0,
        "r_norm.weight": 1.0,
        "k_norm.weight": 1.0,
    }


def orthogonal(rows: int, cols: int, gain: float) -> Tensor:
    """Return an orthogonal matrix (rows, cols) times a gain, in fp32 on the CPU; of gain 0 nothing is drawn."""
    return nn.init.orthogonal_(torch.empty(rows, cols), gain=gain) if gain else torch.zeros(rows, cols)


def _ramp(count: int) -> Tensor:
    """Return numbers from -0.5 to 0.5, (count,)."""
    return torch.arange(count, dtype=torch.float32) / max(count - 1, 1) - 0.5
