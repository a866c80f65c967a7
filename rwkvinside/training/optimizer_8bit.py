"""AdamW with 8-bit moments (bitsandbytes), and its state as plain tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..support.extras import import_extra

OPTIMIZERS = {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit"}
MOMENT_BLOCK = 256  # moments that share a scale

_MOMENTS = {"exp_avg": ("state1", "absmax1", "qmap1"), "exp_avg_sq": ("state2", "absmax2", "qmap2")}


def adamw8bit(param_groups: Sequence[dict], kind: str, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """Return bitsandbytes' AdamW, whose moments take 8 bits (arXiv 2110.02861).

    Those of tensors below 4096 elements take 32.

    Args:
        param_groups: parameter groups.
        kind: a name of `OPTIMIZERS`; the paged one moves states to the CPU when GPU memory is short.
        betas, eps: Adam's.

    Raises:
        UserError: see `check_optimizer`.
    """
    check_optimizer(kind, next(iter(param_groups[0]["params"])).device.type)
    return getattr(_library().optim, OPTIMIZERS[kind])(param_groups, lr=0.0, betas=betas, eps=eps)


def check_optimizer(kind: str, device: str) -> None:
    """Refuse an optimizer that cannot run on a type of device (`UserError`)."""
    if kind == "paged_adamw8bit" and device != "cuda":
        raise UserError(f"optim.kind {kind} needs a CUDA device, this one is {device}", "use optim.kind: adamw8bit")


def moments_of(state: Mapping) -> dict[str, Tensor]:
    """Return an 8-bit state as fp32 moments, flat scales of their blocks and the step.

    It is the state of one parameter. The scales are not needed to read the moments but to pack them again bit for bit:
    a block whose largest element is negative does not contain its own scale.
    """
    bnb = _library().functional
    moments = {"step": torch.tensor(state["step"])}
    for moment, (packed, scales, code) in _MOMENTS.items():
        if scales in state:
            quant = bnb.QuantState(state[scales], code=state[code], blocksize=MOMENT_BLOCK, dtype=torch.float32)
            moments |= {moment: bnb.dequantize_blockwise(state[packed], quant), f"{moment}_scale": state[scales]}
        else:
            moments[moment] = state[packed]
    return moments


def load_moments(optimizer: Any, parameter: nn.Parameter, moments: Mapping[str, Tensor]) -> None:
    """Set what `moments_of` returned.

    Without scales, as from another optimizer, the moments are packed anew. `optimizer` is one of bitsandbytes', which
    has no types.
    """
    bnb = _library().functional
    optimizer.init_state(optimizer.param_groups[0], parameter, 0, 0)  # no group overrides what this reads
    state = optimizer.state[parameter]
    state["step"] = int(moments["step"])
    for moment, (packed, scales, code) in _MOMENTS.items():
        values = moments[moment].to(parameter.device, torch.float32)
        if scales not in state:
            state[packed].copy_(values)
        elif (scale := moments.get(f"{moment}_scale")) is None:
            codes, quant = bnb.quantize_blockwise(values, code=state[code], blocksize=MOMENT_BLOCK)
            state[packed].copy_(codes)
            state[scales].copy_(quant.absmax)
        else:
            state[scales].copy_(scale)
            state[packed].copy_(_nearest(values, state[scales], state[code]))


def _nearest(values: Tensor, scales: Tensor, code: Tensor) -> Tensor:
    """Return indices of the code's values nearest to `values`.

    These are in units of their blocks' scales; `code` ascends.
    """
    block_scales = scales.repeat_interleave(MOMENT_BLOCK)[: values.numel()]
    units = (values.flatten() / block_scales).nan_to_num(0)
    return torch.bucketize(units, (code[1:] + code[:-1]) / 2).to(torch.uint8).view_as(values)


@cache
def _library() -> Any:
    return import_extra("bitsandbytes", "an 8-bit optimizer", "or set stages.<name>.optim.kind=adamw")
