"""One token of WKV-7 in one Triton launch: the state is updated in place. For inference only, there is no backward.

Per batch row and head (RWKV-7 "Goose", arXiv 2503.14456, eq. 1-3; conventions as in `rwkvinside.modeling.wkv7`)

    S <- S diag(exp(w)) + (S a) b^T + v k^T          y = S r

Rows of S are independent, so a program owns a few rows of one head, and the launch is bound by reading and writing S
once (8 N^2 bytes per head). S stays fp32 whatever the inputs are: rounding it to bf16 after every token costs 1e-2 to
3e-2 within some thousand tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvinside.kernels.gpu.launch import Launch, capability, run
from rwkvinside.kernels.gpu.table import StepConfig, lookup_step


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
    B, H, N = r.shape
    y = torch.empty(r.shape, dtype=v.dtype, device=v.device)
    padded = max(16, triton.next_power_of_2(N))
    config = config or lookup_step(padded, capability)
    block = min(config.block_v, padded)
    args: dict = {"mask": mask, "state": state, "y": y, "heads": H}
    for name, x in {"r": r, "w": w, "k": k, "v": v, "a": a, "b": b}.items():
        x = x if x.stride(-1) == 1 else x.contiguous()
        args |= {name: x, f"{name}_batch": x.stride(0), f"{name}_head": x.stride(1)}
        if name in "kvab":
            args[f"{name}_group"] = H // x.shape[1]
    args |= {"state_batch": state.stride(0), "state_head": state.stride(1), "state_row": state.stride(2)}
    args["mask_batch"] = None if mask is None else mask.stride(0)
    # One axis: a grid's second axis ends at 65535, which B * H may exceed.
    blocks = triton.cdiv(N, block)
    constants = {"N": N, "K": padded, "BLOCK": block, "BLOCKS": blocks}
    launch = Launch(_step, (blocks * B * H,), args, constants, config.step)
    return [launch], y


@triton.jit
def _step(
    r,
    w,
    k,
    v,
    a,
    b,
    mask,
    state,
    y,
    heads,
    k_group,
    v_group,
    a_group,
    b_group,
    r_batch,
    r_head,
    w_batch,
    w_head,
    k_batch,
    k_head,
    v_batch,
    v_head,
    a_batch,
    a_head,
    b_batch,
    b_head,
    state_batch,
    state_head,
    state_row,
    mask_batch,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    program = tl.program_id(0)
    head = (program // BLOCKS) % heads
    batch = (program // BLOCKS // heads).to(tl.int64)
    rows = (program % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, K)
    in_rows = rows < N
    in_columns = columns < N

    # The state first: it is nearly all of the traffic, and its load depends on nothing else.
    state += batch * state_batch + head.to(tl.int64) * state_head
    places = state + rows[:, None] * state_row + columns[None, :]
    inside = in_rows[:, None] & in_columns[None, :]
    S = tl.load(places, mask=inside, other=0.0)
    rt = tl.load(r + batch * r_batch + head * r_head + columns, mask=in_columns, other=0.0).to(tl.float32)
    wt = tl.load(w + batch * w_batch + head * w_head + columns, mask=in_columns, other=0.0).to(tl.float32)
    kt = tl.load(k + batch * k_batch + head // k_group * k_head + columns, mask=in_columns, other=0.0).to(tl.float32)
    at = tl.load(a + batch * a_batch + head // a_group * a_head + columns, mask=in_columns, other=0.0).to(tl.float32)
    bt = tl.load(b + batch * b_batch + head // b_group * b_head + columns, mask=in_columns, other=0.0).to(tl.float32)
    vt = tl.load(v + batch * v_batch + head // v_group * v_head + rows, mask=in_rows, other=0.0).to(tl.float32)

    removed = tl.sum(S * at[None, :], axis=1)
    S = S * tl.exp(wt)[None, :] + removed[:, None] * bt[None, :] + vt[:, None] * kt[None, :]
    yt = tl.sum(S * rt[None, :], axis=1)
    if mask is not None:
        real = tl.load(mask + batch * mask_batch)
        yt = tl.where(real, yt, 0.0)
        inside = inside & real
    tl.store(places, S, mask=inside)
    tl.store(y + (batch * heads + head) * N + rows, yt.to(y.dtype.element_ty), mask=in_rows)


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
