"""The rotary embedding of queries and keys in one Triton launch, and its gradient in one: `rotate` as a PyTorch op.

The first R columns of a head turn in pairs (j, j + R / 2), the others are copied. In PyTorch, as transformers writes
it, that is ten launches. A program owns a token: it loads cos and sin once for all heads of queries and keys. With
x the first and y the second half of what turns:

    x' = x cos_1 - y sin_1          y' = y cos_2 + x sin_2
    dx = dx' cos_1 + dy' sin_2      dy = dy' cos_2 - dx' sin_1

which is the same by the transposed matrix; halves of cos and sin need not agree. Products are rounded to the type of
the tensors, and then their sum, as PyTorch rounds: the results are the same bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvinside.kernels.gpu.kernels import INTERPRETED, RUNTIME, _round_to_bf16, _store
from rwkvinside.kernels.gpu.launch import Launch, run
from rwkvinside.kernels.gpu.table import Tuning

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Columns of each half, over heads, that a program has at a time, and of a thread: 16 bytes of bf16
TILE, COLUMNS = 1024, 8


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys as transformers' `apply_rotary_pos_emb` does in the layout of halves.

    Args:
        q: (B, H, T, N), bf16, fp16 or fp32, as a view of (B, T, H, N) or with any other strides.
        k: (B, G, T, N) in the dtype of q.
        cos, sin: (B or 1, T, R) in the dtype of q, R even and at most N: columns from R on are copied. They carry no
            gradient.

    Returns:
        q and k rotated, new memory: transposed views of contiguous (B, T, heads, N). They carry gradient to q and k.

    Raises:
        ValueError: see `why_not`.
        RuntimeError: tensors that are not on a GPU, outside of Triton's interpreter.
    """
    if reason := why_not(q, k, cos, sin):
        raise ValueError(reason)
    if q.device.type != "cuda" and not INTERPRETED.value:
        raise RuntimeError(f"the Triton kernels need a CUDA device, q is on {q.device}")
    return _rotate(q, k, cos, sin, False)


def why_not(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    """Return why `rotate` does not take such tensors, None if it does; where they are aside."""
    if q.dim() != 4 or q.dtype not in DTYPES:
        return f"q has shape {tuple(q.shape)} and {q.dtype}, expected (B, H, T, N) in bf16, fp16 or fp32"
    B, _, T, N = q.shape
    if k.dim() != 4 or k.shape[::2] != (B, T) or k.shape[3] != N:
        return f"k has shape {tuple(k.shape)}, expected {(B, 'heads', T, N)}"
    R = cos.shape[-1]
    if cos.dim() != 3 or sin.shape != cos.shape or cos.shape[0] not in (1, B) or cos.shape[1] != T:
        return f"cos has shape {tuple(cos.shape)}, sin {tuple(sin.shape)}, expected {(B, T)} or {(1, T)} and columns"
    if R % 2 or not 2 <= R <= N:
        return f"cos and sin have {R} columns: as many of the {N} turn in pairs, an even number"
    if {x.dtype for x in (k, cos, sin)} != {q.dtype} or {x.device for x in (k, cos, sin)} != {q.device}:
        given = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, cos, sin))
        return f"q, k, cos and sin are {given}: expected one dtype on one device"
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        return "cos and sin get no gradient, and one of them needs it"
    return None


@torch.library.custom_op("rwkvinside::rotate_triton", mutates_args=())
def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    launches, out = plan_rotate(q, k, cos, sin, transposed)
    run(launches, q.device)
    return out


@_rotate.register_fake
def _(q, k, cos, sin, transposed):
    return _like(q), _like(k)


def _setup(ctx, inputs, output) -> None:
    *_, cos, sin, ctx.transposed = inputs
    ctx.save_for_backward(cos, sin)


def _differentiate(ctx, dq, dk):
    return *_rotate(dq, dk, *ctx.saved_tensors, not ctx.transposed), None, None, None


_rotate.register_autograd(_differentiate, setup_context=_setup)


def plan_rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, transposed: bool = False
) -> tuple[list[Launch], tuple[Tensor, Tensor]]:
    """Return the launch that `rotate` runs, and its results; launch nothing.

    Meta tensors are enough. `transposed`: rotate by the transposed matrix, which is the backward.
    """
    out = _like(q), _like(k)
    (B, H, T, N), G, R = q.shape, k.shape[1], cos.shape[-1]
    args: dict[str, Any] = {}
    for name, x in (("q", q), ("k", k)):
        x = x if x.stride(3) == 1 else x.contiguous()
        args |= {f"{name}_": x, f"{name}_b": x.stride(0), f"{name}_h": x.stride(1), f"{name}_t": x.stride(2)}
    for name, x in (("cos", cos), ("sin", sin)):
        x = x if x.stride(2) == 1 else x.contiguous()
        args |= {f"{name}_": x, f"{name}_b": x.stride(0) if len(x) > 1 else 0, f"{name}_t": x.stride(1)}
    args |= {"q_out_": out[0], "k_out_": out[1], "T": T, "H": H, "G": G}
    half, rest = (triton.next_power_of_2(columns) for columns in (R // 2, N - R))
    heads = min(triton.next_power_of_2(max(H, G)), max(1, TILE // half))
    constants = {"D": N, "R": R, "HALF": half, "REST": rest, "HEADS": heads, "TRANSPOSED": transposed}
    warps = min(max(heads * half // (32 * COLUMNS), 1), 8)
    # sm_90 multiplies and adds in bf16, too: casts alone do not keep a product's rounding
    return [Launch(rotate_heads, (B * T,), args, constants, Tuning(warps, 1), contract=False)], out


def _like(x: Tensor) -> Tensor:
    """Return new memory for (B, heads, T, N), laid out as (B, T, heads, N)."""
    B, heads, T, N = x.shape
    return x.new_empty(B, T, heads, N).transpose(1, 2)


@triton.jit
def _load_halves(x_, column, inside, R: tl.constexpr):
    """Load both halves of what turns of a row."""
    first = tl.load(x_ + column, mask=inside, other=0.0).to(tl.float32)
    return first, tl.load(x_ + column + R // 2, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _sum(a, b, c, d, out_):
    """Return a b + c d, whose products are rounded as they would be in the memory `out_`."""
    first, second = a * b, c * d
    if INTERPRETED and out_.dtype.element_ty == tl.bfloat16:
        first, second = _round_to_bf16(first), _round_to_bf16(second)
    else:
        first = first.to(out_.dtype.element_ty).to(tl.float32)
        second = second.to(out_.dtype.element_ty).to(tl.float32)
    return first + second


@triton.jit
def _rotate_token(
    x_,
    x_h,
    out_,
    heads,
    cos_1,
    cos_2,
    to_1,
    to_2,
    D: tl.constexpr,
    R: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Rotate the heads of a token; `to_1` and `to_2` are what each half gets of the other."""
    column = tl.arange(0, HALF)[None, :]
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS)[:, None]
        row_, to_ = x_ + head.to(tl.int64) * x_h, out_ + head * D
        inside = (head < heads) & (column < R // 2)
        first, second = _load_halves(row_, column, inside, R)
        _store(to_ + column, _sum(first, cos_1, second, to_1, out_), inside)
        _store(to_ + column + R // 2, _sum(second, cos_2, first, to_2, out_), inside)
        if R < D:
            rest = R + tl.arange(0, REST)[None, :]
            copied = (head < heads) & (rest < D)
            tl.store(to_ + rest, tl.load(row_ + rest, mask=copied), mask=copied)


@triton.jit(do_not_specialize=RUNTIME)
def rotate_heads(
    q_,
    q_b,
    q_h,
    q_t,
    k_,
    k_b,
    k_h,
    k_t,
    cos_,
    cos_b,
    cos_t,
    sin_,
    sin_b,
    sin_t,
    q_out_,
    k_out_,
    T,
    H,
    G,
    D: tl.constexpr,
    R: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    HEADS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Rotate the queries and keys of a token in each program."""
    token = tl.program_id(0)
    b, t = (token // T).to(tl.int64), (token % T).to(tl.int64)
    token = token.to(tl.int64)
    # the same for all heads, and loaded for each, so that no value moves between threads
    column = tl.broadcast_to(tl.arange(0, HALF)[None, :], (HEADS, HALF))
    inside = column < R // 2
    cos_1, cos_2 = _load_halves(cos_ + b * cos_b + t * cos_t, column, inside, R)
    sin_1, sin_2 = _load_halves(sin_ + b * sin_b + t * sin_t, column, inside, R)
    if TRANSPOSED:
        to_1, to_2 = sin_2, -sin_1
    else:
        to_1, to_2 = -sin_1, sin_2
    q_ += b * q_b + t * q_t
    _rotate_token(q_, q_h, q_out_ + token * H * D, H, cos_1, cos_2, to_1, to_2, D, R, HALF, REST, HEADS)
    k_ += b * k_b + t * k_t
    _rotate_token(k_, k_h, k_out_ + token * G * D, G, cos_1, cos_2, to_1, to_2, D, R, HALF, REST, HEADS)
