"""WKV-7 for inference in one Triton kernel: a decode step, and a prefill of any length, token by token.

Per batch row and head (RWKV-7 "Goose", arXiv 2503.14456, eq. 1-3; conventions as in wkv7.py)

    S <- S diag(exp(w)) + (S a) b^T + v k^T          y = S r

Rows of S are independent, so a program owns a few rows of one head and holds them in registers over all tokens. One
token is bound by reading and writing S once (8 N^2 bytes per head), a long prefill by the latency of a token: two sums
over a row. S stays fp32 whatever the inputs are: rounding it to bf16 after every token costs 1e-2 to 3e-2 within some
thousand tokens.

Without gradient and without packed sequences: training takes the kernels of `rwkvinside.kernels` or the chunked path,
never this file. It travels with exported models, which run it on a GPU where that package is not installed;
`rwkvinside.kernels` takes its decode step from here. Needs torch and triton only, and can be imported without triton.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # `why_unavailable` says so
    triton = tl = None

ROWS = 16  # of the state per program: few, as one sequence has few heads
OLDEST = (8, 0)  # compute capability


def _jit(function: Callable) -> Any:
    return function if triton is None else triton.jit(function)


@_jit
def _step(  # type: ignore[no-untyped-def]  # pointers and numbers of Triton
    r, w, k, v, a, b, mask, state, y, T, heads, k_group, v_group, a_group, b_group,
    r_batch, r_time, r_head, w_batch, w_time, w_head, k_batch, k_time, k_head,
    v_batch, v_time, v_head, a_batch, a_time, a_head, b_batch, b_time, b_head,
    state_batch, state_head, state_row, mask_batch, mask_time,
    N: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
) -> None:  # fmt: skip
    program = tl.program_id(0)
    head = ((program // BLOCKS) % heads).to(tl.int64)
    batch = (program // BLOCKS // heads).to(tl.int64)
    rows = (program % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, K)
    in_rows = rows < N
    in_columns = columns < N

    # The state first: of one token it is nearly all of the traffic, and its load depends on nothing else.
    state += batch * state_batch + head * state_head
    places = state + rows[:, None] * state_row + columns[None, :]
    inside = in_rows[:, None] & in_columns[None, :]
    S = tl.load(places, mask=inside, other=0.0)
    r += batch * r_batch + head * r_head + columns
    w += batch * w_batch + head * w_head + columns
    k += batch * k_batch + head // k_group * k_head + columns
    a += batch * a_batch + head // a_group * a_head + columns
    b += batch * b_batch + head // b_group * b_head + columns
    v += batch * v_batch + head // v_group * v_head + rows
    y += (batch * T * heads + head) * N + rows
    rt = tl.load(r, mask=in_columns, other=0.0)
    wt = tl.load(w, mask=in_columns, other=0.0)
    kt = tl.load(k, mask=in_columns, other=0.0)
    at = tl.load(a, mask=in_columns, other=0.0)
    bt = tl.load(b, mask=in_columns, other=0.0)
    vt = tl.load(v, mask=in_rows, other=0.0)
    for t in range(T):
        # The next token is on its way while this one is computed; the last one loads itself again. With one token
        # (T is then a constant) neither this nor a loop is left in the code.
        ahead = tl.minimum(t + 1, T - 1).to(tl.int64)
        r_next = tl.load(r + ahead * r_time, mask=in_columns, other=0.0)
        w_next = tl.load(w + ahead * w_time, mask=in_columns, other=0.0)
        k_next = tl.load(k + ahead * k_time, mask=in_columns, other=0.0)
        a_next = tl.load(a + ahead * a_time, mask=in_columns, other=0.0)
        b_next = tl.load(b + ahead * b_time, mask=in_columns, other=0.0)
        v_next = tl.load(v + ahead * v_time, mask=in_rows, other=0.0)

        removed = tl.sum(S * at.to(tl.float32)[None, :], axis=1)
        written = (
            removed[:, None] * bt.to(tl.float32)[None, :] + vt.to(tl.float32)[:, None] * kt.to(tl.float32)[None, :]
        )
        after = S * tl.exp(wt.to(tl.float32))[None, :] + written
        yt = tl.sum(after * rt.to(tl.float32)[None, :], axis=1)
        if mask is None:
            S = after
        else:
            real = tl.load(mask + batch * mask_batch + t * mask_time) != 0
            S = tl.where(real, after, S)
            yt = tl.where(real, yt, 0.0)
        tl.store(y, yt.to(y.dtype.element_ty), mask=in_rows)
        y += heads * N
        rt, wt, kt, at, bt, vt = r_next, w_next, k_next, a_next, b_next, v_next
    tl.store(places, S, mask=inside)


class Plan(NamedTuple):
    """A launch of the kernel.

    Attributes:
        kernel: the `triton.jit` function.
        grid: number of programs.
        args: run-time arguments by name.
        constants: `tl.constexpr` arguments by name.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    constants: dict[str, Any]


def plan(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    mask: Tensor | None = None,
    *,
    rows: int = ROWS,
) -> tuple[Plan, Tensor]:
    """Return the launch that advances `state` in place, and y; launch nothing.

    Meta tensors are enough.

    Args:
        r, w, k, v, a, b, mask: as of `recur`, or of one token: without the dimension T.
        state: (B, H, N, N) fp32 as (value, key), its last dimension contiguous.
        rows: of the state per program, a power of two.

    Returns:
        The launch, and y (B, [T,] H, N) in v's dtype, which it fills.
    """
    B, H, N = r.shape[0], r.shape[-2], r.shape[-1]
    T = r.shape[1] if r.dim() == 4 else 1
    y = torch.empty(r.shape, dtype=v.dtype, device=v.device)
    padded = max(16, triton.next_power_of_2(N))
    block = min(rows, padded)
    # (bool loads differ between the interpreter and the compiler)
    args: dict[str, Any] = {"mask": None if mask is None else mask.view(torch.uint8)}
    args |= {"state": state, "y": y, "T": T, "heads": H}
    for name, x in (("r", r), ("w", w), ("k", k), ("v", v), ("a", a), ("b", b)):
        x = x if x.stride(-1) == 1 else x.contiguous()
        time = x.stride(1) if x.dim() == 4 else 0
        args |= {name: x, f"{name}_batch": x.stride(0), f"{name}_time": time, f"{name}_head": x.stride(-2)}
        if name in "kvab":
            args[f"{name}_group"] = H // x.shape[-2]
    args |= {"state_batch": state.stride(0), "state_head": state.stride(1), "state_row": state.stride(2)}
    args["mask_batch"] = None if mask is None else mask.stride(0)
    args["mask_time"] = None if mask is None else mask.stride(1) if mask.dim() == 2 else 0
    # One axis: a grid's second axis ends at 65535, which B * H may exceed.
    blocks = triton.cdiv(N, block)
    constants = {"N": N, "K": padded, "BLOCK": block, "BLOCKS": blocks}
    return Plan(_step, (blocks * B * H,), args, constants), y


def warps(head_size: int) -> int:
    """Return the warps of a program of `ROWS` rows: two threads for each column of the state.

    With fewer, Triton 3.6 and 3.7 pass the vectors of every token through shared memory, 12 barriers a token instead
    of 2.
    """
    return max(4, triton.next_power_of_2(head_size) // 16)


@torch.compiler.disable
@torch.no_grad()
def recur(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over a batch of rows, without gradient.

    Args:
        r: (B, T, H, N), bf16, fp16 or fp32; computed in fp32. N is a multiple of 8 from 8 to 256.
        w: (B, T, H, N), log decay, <= 0: any, there are no chunks.
        k, v, a, b: (B, T, H, N), or (B, T, G, N) each with G dividing H: head h reads head h // (H / G).
        state: (B, H, N, N) as (value, key); None is zero.
        mask: (B, T) bool, True for real tokens; elsewhere the state does not change and y is 0.
        inplace: the final state may be written over `state`.

    Returns:
        y (B, T, H, N) in v's dtype, and the final state in fp32.
    """
    B, T, H, N = r.shape
    if state is None:
        state = r.new_zeros(B, H, N, N, dtype=torch.float32)
    else:
        state = state.to(torch.float32, copy=not inplace).contiguous()
    if r.numel() == 0:
        return v.new_empty(r.shape), state
    launch, y = plan(r, w, k, v, a, b, state, mask)
    with torch.cuda.device(r.device if r.is_cuda else -1):
        launch.kernel[launch.grid](**launch.args, **launch.constants, num_warps=warps(N), num_stages=1)
    return y, state


@functools.cache
def why_unavailable() -> str | None:
    """Return why Triton kernels cannot run here and what to install, None if they can."""
    if triton is None:
        return "the package triton is not installed: pip install triton"
    if _interpreted():
        return None
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    if torch.version.hip is not None:
        return "the kernels are made for NVIDIA GPUs"
    oldest = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    if oldest < OLDEST:
        return "the kernels need GPUs of compute capability {}.{} or later, and one here has {}.{}".format(
            *OLDEST, *oldest
        )
    return None


def why_unsupported(device: str, dtype: torch.dtype, head_size: int) -> str | None:
    """Return why Triton kernels do not take such tensors on any machine, None if they do.

    Args:
        device: type of the device, such as "cuda".
        dtype: of the inputs.
        head_size: N.
    """
    if dtype == torch.float64:
        return "it computes in fp32 and was given float64"
    if head_size % 8 or not 8 <= head_size <= 256:
        return f"it takes head sizes that are multiples of 8 from 8 to 256, not {head_size}"
    expected = "cpu" if _interpreted() else "cuda"
    return None if device == expected else f"it runs on {expected} tensors and was given {device}"


def _interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernel, on a CPU."""
    return triton is not None and not isinstance(_step, triton.runtime.JITFunction)
