"""One token of WKV-7 in one Triton launch: the state is updated in place. For inference only, there is no backward.

The kernel is that of `rwkvinside.modeling.wkv7_triton`, which exported models carry; here it is an operator that a
compiler sees, with settings from the table.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from rwkvinside.kernels.gpu.launch import Launch, capability, run
from rwkvinside.kernels.gpu.table import StepConfig, lookup_step
from rwkvinside.modeling import wkv7_triton


@torch.library.custom_op("rwkvinside::wkv7_triton_step", mutates_args={"state"})
def step(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Take one step of the recurrence for every row of the batch.

    Args:
        r: (B, H, N), any floating dtype; computed in fp32. N is a multiple of 8, at most 256.
        w: (B, H, N), log decay, <= 0.
        k, v, a, b: (B, H, N), or (B, G, N) each with G dividing H: head h reads head h // (H / G).
        state: (B, H, N, N) fp32 as (value, key), its last dimension contiguous; updated in place.
        mask: (B,) bool, True for real tokens; elsewhere the state does not change and y is 0.

    Returns:
        y (B, H, N) in v's dtype.

    Raises:
        ValueError: shapes, a dtype or a layout that do not fit.
    """
    launches, y = plan_step(r, w, k, v, a, b, state, mask, capability=capability(state.device))
    run(launches, state.device)
    return y


@step.register_fake
def _(r, w, k, v, a, b, state, mask=None):
    return torch.empty(r.shape, dtype=v.dtype, device=v.device)


def plan_step(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    mask: Tensor | None = None,
    *,
    capability: tuple[int, int] | None,
    config: StepConfig | None = None,
) -> tuple[list[Launch], Tensor]:
    """Return the launches that `step` runs, and y; launch nothing.

    Meta tensors are enough.

    Args:
        r, w, k, v, a, b, state, mask: as in `step`.
        capability: compute capability to plan for; None is Triton's interpreter.
        config: replaces the table's.
    """
    _check(r, w, k, v, a, b, state, mask)
    config = config or lookup_step(max(16, triton.next_power_of_2(r.shape[2])), capability)
    planned, y = wkv7_triton.plan(r, w, k, v, a, b, state, mask, rows=config.block_v)
    return [Launch(*planned, config.step)], y


def _check(r, w, k, v, a, b, state, mask) -> None:
    if r.dim() != 3 or r.shape[2] % 8 or not 8 <= r.shape[2] <= 256:
        raise ValueError(f"r has shape {tuple(r.shape)}, expected (B, H, N) with N a multiple of 8 from 8 to 256")
    B, H, N = r.shape
    if w.shape != r.shape:
        raise ValueError(f"w has shape {tuple(w.shape)}, r has {tuple(r.shape)}: they must agree")
    for name, x in (("k", k), ("v", v), ("a", a), ("b", b)):
        if x.dim() != 3 or x.shape[0] != B or x.shape[2] != N or x.shape[1] == 0 or H % x.shape[1]:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {(B, H, N)} or fewer heads that divide {H}")
    if state.shape != (B, H, N, N) or state.dtype != torch.float32 or state.stride(3) != 1:
        raise ValueError(
            f"state has shape {tuple(state.shape)}, {state.dtype} and strides {state.stride()}, expected "
            f"{(B, H, N, N)} in float32 with its last dimension contiguous"
        )
    if mask is not None and (mask.shape != (B,) or mask.dtype != torch.bool):
        raise ValueError(f"mask has shape {tuple(mask.shape)} and {mask.dtype}, expected {(B,)} of bool")
