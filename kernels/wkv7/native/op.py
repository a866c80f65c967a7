"""The native kernels as PyTorch operators with gradients: `rwkvinside::wkv7_native` and its backward."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from . import library
from .library import SEGMENT, pointer, view


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence of `rwkvinside.modeling.wkv7` on a CPU, in fp32.

    The arguments are already checked there.

    Args:
        r, w: (B, T, H, N), N from 8 to 256, fp32, bf16 or fp16; w is the log decay.
        k, v, a, b: (B, T, G, N) each with its own G that divides H.
        state: (B or S, H, N, N) as (value, key), None for zero.
        mask: (B, T) bool; masked tokens are skipped.
        cu_seqlens: (S + 1,) with B = 1.
        inplace: overwrite `state` (fp32 and contiguous) with the final state; only without gradients.

    Returns:
        y (B, T, H, N) in v's dtype and the final state in fp32.
    """
    inputs = [x.float() if x.dtype == torch.float16 else x for x in (r, w, k, v, a, b)]
    tracked = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*inputs, state))
    if tracked or torch.compiler.is_compiling():
        y, final, _, _ = _forward(*inputs, state, mask, cu_seqlens, tracked)
    else:
        # Without the operator's bookkeeping, which costs as much as a token of a small model.
        y, final, _, _ = _run_forward(*inputs, state, mask, cu_seqlens, False, inplace)
    return y.to(v.dtype), final


class _Tokens:
    """The tokens of each sequence as the library takes them, kept in memory."""

    def __init__(self, like: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, work: int, checkpoints: bool):
        B, T, H, N = like.shape
        edges = torch.arange(B + 1) * T if cu_seqlens is None else cu_seqlens.to(torch.int64)
        if mask is None:
            self.tokens, self.bounds = None, edges.contiguous()
        else:
            self.tokens = mask.flatten().nonzero().flatten()
            self.bounds = F.pad(mask.flatten().cumsum(0), (1, 0))[edges].contiguous()
        self.segments = None
        if checkpoints:
            self.segments = F.pad(((self.bounds.diff() + SEGMENT - 1) // SEGMENT).cumsum(0), (1, 0))
        self.sequences = edges.numel() - 1
        # Waking the other threads takes as long as about a quarter of a million multiplications.
        threads = torch.get_num_threads() if work * B * T * H * N * N > 1 << 18 else 1
        pointers = (pointer(self.bounds), pointer(self.tokens), pointer(self.segments))
        self.problem = library.Problem(self.sequences, H, N, *pointers, threads)


def _flat(x: Tensor) -> Tensor:
    """Reshape (B, T, G, N) to (B T, G, N) with a contiguous last dimension.

    Copies only where strides require it.
    """
    x = x.reshape(-1, *x.shape[2:])
    return x if x.stride(-1) == 1 else x.contiguous()


def _run_forward(r, w, k, v, a, b, state, mask, cu_seqlens, save, inplace=False):
    B, T, H, N = r.shape
    which = _Tokens(r, mask, cu_seqlens, work=1, checkpoints=save)
    allocate = torch.empty if mask is None else torch.zeros
    y = allocate(B, T, H, N, dtype=v.dtype)
    initial = None if state is None else state.to(torch.float32).contiguous()
    final = initial if inplace and initial is not None else torch.empty(which.sequences, H, N, N)
    checkpoints = torch.empty(int(which.segments[-1]) if save else 0, H, N, N)
    removed = torch.empty(B * T if save else 0, H, N)
    flat = [_flat(x) for x in (r, w, k, v, a, b, y)]
    io = library.Forward(
        *(view(x, H) for x in flat),
        pointer(initial),
        pointer(final),
        *(pointer(x) if save else None for x in (checkpoints, removed)),
    )
    library.load().wkv7_forward(ctypes.byref(which.problem), ctypes.byref(io))
    return y, final, checkpoints, removed


@torch.library.custom_op("rwkvinside::wkv7_native", mutates_args=(), device_types="cpu")
def _forward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, the final state, and what the backward needs.

    That is the state before every 16th token and S a of every token; both are empty without `save`.
    """
    return _run_forward(r, w, k, v, a, b, state, mask, cu_seqlens, save)


@_forward.register_fake
def _(r, w, k, v, a, b, state, mask, cu_seqlens, save):
    B, T, H, N = r.shape
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if not save:
        rows = 0
    elif mask is None and cu_seqlens is None:
        rows = B * ((T + SEGMENT - 1) // SEGMENT)
    else:
        rows = torch.library.get_ctx().new_dynamic_size()  # depends on the lengths, known from real tensors only
    fp32 = dict(dtype=torch.float32)
    return (
        torch.empty_like(r, dtype=v.dtype, memory_format=torch.contiguous_format),
        r.new_empty(sequences, H, N, N, **fp32),
        r.new_empty(rows, H, N, N, **fp32),
        r.new_empty(B * T if save else 0, H, N, **fp32),
    )


@torch.library.custom_op("rwkvinside::wkv7_native_backward", mutates_args=(), device_types="cpu")
def _backward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    removed: Tensor,
    dy: Tensor,
    d_final: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of r, w, k, v, a, b and of the initial state.

    The first six have the inputs' dtypes and numbers of heads, the last is in fp32.
    """
    B, T, H, N = r.shape
    which = _Tokens(r, mask, cu_seqlens, work=3, checkpoints=True)
    inputs = (r, w, k, v, a, b)
    allocate = torch.empty if mask is None else torch.zeros
    # heads that share a key or value are added up afterwards, in fp32
    grads = [allocate(B, T, H, N, dtype=x.dtype if x.shape[2] == H else torch.float32) for x in inputs]
    d_initial = torch.empty(which.sequences, H, N, N)
    flat = [_flat(x) for x in (*inputs, dy.to(torch.float32) if dy.dtype == torch.float16 else dy)]
    d_final = None if d_final is None else d_final.contiguous()
    io = library.Backward(
        *(view(x, H) for x in flat),
        *(pointer(x) for x in (checkpoints, removed, d_final)),
        *(view(_flat(g), H) for g in grads),
        pointer(d_initial),
    )
    library.load().wkv7_backward(ctypes.byref(which.problem), ctypes.byref(io))
    sums = [
        g if x.shape[2] == H else g.unflatten(2, (x.shape[2], -1)).sum(3).to(x.dtype)
        for g, x in zip(grads, inputs, strict=True)
    ]
    return (*sums, d_initial)


@_backward.register_fake
def _(r, w, k, v, a, b, mask, cu_seqlens, checkpoints, removed, dy, d_final):
    B, _, H, N = r.shape
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (
        *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (r, w, k, v, a, b)),
        r.new_empty(sequences, H, N, N, dtype=torch.float32),
    )


def _setup_context(ctx, inputs, output) -> None:
    *tensors, state, mask, cu_seqlens, _ = inputs
    _, _, checkpoints, removed = output
    ctx.set_materialize_grads(False)  # no zeros for the gradients of what is only saved
    ctx.has_state = state is not None
    ctx.state_dtype = None if state is None else state.dtype
    ctx.save_for_backward(*tensors, mask, cu_seqlens, checkpoints, removed)


def _differentiate(ctx, dy, d_final, *_):
    r, *_ = saved = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(r)
    *grads, d_initial = _backward(*saved, dy, d_final)
    return (*grads, d_initial.to(ctx.state_dtype) if ctx.has_state else None, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_setup_context)
