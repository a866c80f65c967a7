"""AdamW with 8-bit moments (bitsandbytes), and its state as plain tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..hybrid.quantized_linear import _library

OPTIMIZERS = {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit"}


MOMENT_BLOCK = 256  # moments that share a scale


_MOMENTS = {"exp_avg": ("state1", "absmax1", "qmap1"), "exp_avg_sq": ("state2", "absmax2", "qmap2")}


def adamw8bit(parts: Sequence[dict], kind: str, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW, whose moments take 8 bits (arXiv 2110.02861); of tensors below 4096 elements 32.

    Args:
        parts: parameter groups.
        kind: a name of `OPTIMIZERS`; the paged one moves states to the CPU when GPU memory is short.

    Raises:
        UserError: see `check_optimizer`.
    """
    check_optimizer(kind, next(iter(parts[0]["params"])).device.type)
    return getattr(_library().optim, OPTIMIZERS[kind])(parts, lr=0.0, betas=betas, eps=eps)


def check_optimizer(kind: str, device: str) -> None:
    """Refuse an optimizer that cannot run on a type of device (`UserError`)."""
    if kind == "paged_adamw8bit" and device != "cuda":
        raise UserError(f"optim.kind {kind} needs a CUDA device, this one is {device}", "use optim.kind: adamw8bit")


def moments_of(state: Mapping) -> dict[str, Tensor]:
    """An 8-bit optimizer's state of one parameter as fp32 moments, flat scales of their blocks and the step.

    The scales are not needed to read the moments but to pack them again bit for bit: a block whose largest element is
    negative does not contain its own scale.
    """
    bnb = _library().functional
    found = {"step": torch.tensor(state["step"])}
    for moment, (packed, scales, code) in _MOMENTS.items():
        if scales in state:
            quant = bnb.QuantState(state[scales], code=state[code], blocksize=MOMENT_BLOCK, dtype=torch.float32)
            found |= {moment: bnb.dequantize_blockwise(state[packed], quant), f"{moment}_scale": state[scales]}
        else:
            found[moment] = state[packed]
    return found


def load_moments(optimizer: Any, parameter: nn.Parameter, moments: Mapping[str, Tensor]) -> None:
    """Inverse of `moments_of`; without scales, as from another optimizer, the moments are packed anew.

    `optimizer` is one of bitsandbytes', which has no types.
    """
    bnb = _library().functional
    optimizer.init_state(optimizer.param_groups[0], parameter, 0, 0)  # no group overrides what this reads
    state = optimizer.state[parameter]
    state["step"] = int(moments["step"])
    for moment, (packed, scales, code) in _MOMENTS.items():
        given = moments[moment].to(parameter.device, torch.float32)
        if scales not in state:
            state[packed].copy_(given)
        elif (scale := moments.get(f"{moment}_scale")) is None:
            found, quant = bnb.quantize_blockwise(given, code=state[code], blocksize=MOMENT_BLOCK)
            state[packed].copy_(found)
            state[scales].copy_(quant.absmax)
        else:
            state[scales].copy_(scale)
            state[packed].copy_(_nearest(given, state[scales], state[code]))


def _nearest(values: Tensor, scales: Tensor, code: Tensor) -> Tensor:
    """Indices of the code's values nearest to `values` in units of their blocks' scales; `code` ascends."""
    each = scales.repeat_interleave(MOMENT_BLOCK)[: values.numel()]
    units = (values.flatten() / each).nan_to_num(0)
    return torch.bucketize(units, (code[1:] + code[:-1]) / 2).to(torch.uint8).view_as(values)
