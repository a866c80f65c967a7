"""The fused steps of whole mixers, beside the mixer's own PyTorch path in float64."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ...modeling.mixer_presets import TimeMixerConfig
from ...modeling.mixer_step import is_fused
from ...modeling.time_mixer import MixerState, TimeMixer

PRESETS = ("cxa079", "arwkv7", "x070")  # rotation and residuals; learned key scales; those, token shift and group norm
ROWS = 3


@torch.no_grad()
def mixer_steps(preset: str, device: str, head_size: int, tokens: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Run tokens of the first two RWKV layers, one by one through their states, some of them masked.

    Returns:
        Outputs and states by name, each in fp32 from the fused steps, and in fp64 from PyTorch.

    Raises:
        RuntimeError: the fused step would not run.
    """
    torch.manual_seed(0)
    width = 4 * head_size
    sizes = {"hidden_size": width, "num_heads": 4, "num_kv_heads": 2, "head_size": head_size}
    config = TimeMixerConfig.from_preset(preset, qk_norm=True, backend="triton", **sizes)
    fast = [TimeMixer(config, is_first, layer=i, num_layers=3) for i, is_first in enumerate((True, False))]
    for p in (p for mixer in fast for p in mixer.parameters()):  # nothing at its neutral start
        p.data.add_(0.3 * torch.randn_like(p))
    slow = copy.deepcopy(fast)
    for mixer in slow:
        mixer.double().mixer_config = config.replace(backend="reference")
    fast = [mixer.to(device) for mixer in fast]
    x = torch.randn(ROWS, tokens, width)
    mask = torch.rand(ROWS, tokens) < 0.8
    angles = torch.rand(1, tokens, head_size // 2).repeat(1, 1, 2) * 6
    if not is_fused(config, x[:, :1].to(device), None):
        raise RuntimeError(f"a token of {preset} does not run in one launch")
    found = _taken(fast, x.to(device), mask.to(device), angles.to(device))
    wanted = _taken(slow, x.double(), mask, angles.double())
    return {name: (x.double().cpu(), wanted[name]) for name, x in found.items()}


def _taken(mixers: list[TimeMixer], x: Tensor, mask: Tensor, angles: Tensor) -> dict[str, Tensor]:
    """Return outputs (B, T, D) of the first layer and of a later one, masked ones as 0, and the latter's states."""
    states: list[MixerState | None] = [None] * len(mixers)
    outputs: list[list[Tensor]] = [[] for _ in mixers]
    for t in range(x.shape[1]):
        now = slice(t, t + 1)
        first = None
        for i, mixer in enumerate(mixers):
            y, handed_on, states[i] = mixer(
                x[:, now],
                first=first,
                state=states[i],
                rope=(angles[:, now].cos(), angles[:, now].sin()),
                mask=mask[:, now],
                inplace=True,
            )
            first = first or handed_on
            outputs[i].append(y.masked_fill(~mask[:, now, None], 0))
    assert states[-1] is not None
    last = {"recurrence": states[-1].wkv, "shift": states[-1].shift}
    found = {f"layer {i}": torch.cat(ys, 1) for i, ys in enumerate(outputs)}
    return found | {name: state for name, state in last.items() if state is not None}
