"""The WKV-7 recurrence: its contract, a slow reference, a chunked path for any torch device, and the way to the
compiled kernels of `rwkvinside.kernels` where that package is installed.

Per batch row and head, with the state S of shape (N_v, N_k) in fp32 (RWKV-7 "Goose", arXiv 2503.14456, eq. 1-3)

    S_t = S_{t-1} diag(exp(log_decay_t)) + (S_{t-1} a_t) b_t^T + v_t k_t^T          y_t = S_t r_t

`wkv7` is the one public door. Conventions that differ elsewhere: the decay is given as log decay (not as its own
logarithm), the state is (value, key) (fla stores its transpose), and y is not scaled. This file travels with exported
models: torch only, no I/O.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from rwkvinside import kernels
except ImportError:  # an exported model on a machine without the package
    kernels = None

BACKENDS = ("auto", "reference", "chunked", "native", "triton")
PRECISIONS = ("auto", "fp32", "high", "balanced", "fast")


def wkv7(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    precision: str = "auto",
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run the WKV-7 recurrence over a batch of sequences.

    Args:
        r: (B, T, H, N), any floating dtype; computed in fp32 (fp64 when `r` is fp64). In the RWKV-7 mixer a = -kk and
            b = kk * iclr with kk the L2-normalised key.
        log_decay: (B, T, H, N), values <= 0; at least -5 for chunked and triton. fp32 is advised (bf16 costs 2-3 %
            near 0).
        k, v, a, b: (B, T, H, N), or (B, T, G, N) each with its own G dividing H: head h reads head h // (H / G).
        state: initial state (B, H, N, N) as (value, key), or (S, H, N, N) with `cu_seqlens`; None is zero.
        mask: (B, T) bool, True for real tokens. A masked step leaves the state as it is and outputs 0.
        cu_seqlens: (S + 1,) integers, 0 first and T last: sequence s is [cu[s], cu[s+1]); needs B = 1. Every sequence
            starts from its own state; empty sequences are allowed. On a GPU its values are not checked.
        backend: "reference" (a loop over time), "chunked" (matrix products over chunks, hand-written backward that
            recomputes), "native" (C++ on a CPU), "triton" (GPU), or "auto": the compiled kernel of the device where
            it can run, else the reference for a single step and chunked for more.
        precision: of triton: "fp32", "high", "balanced" or "fast" (docs/wkv7.md); "auto" is fp32 for fp32 inputs and
            balanced otherwise. The other backends compute in the dtype of the state whatever it says.
        inplace: the final state may be written over `state`, which saves a copy per token when decoding. The returned
            one counts: a backend that has to keep or convert `state` leaves it alone.

    Returns:
        y (B, T, H, N) in v's dtype, and the final state (B or S, H, N, N) in fp32 (fp64 for fp64 inputs). Both carry
        gradient to all inputs, the initial state included.

    Raises:
        ValueError: shapes that do not fit, a log decay outside what the chosen path represents, an unknown backend.
        RuntimeError: a backend that is known but cannot run here or on these tensors.
    """
    _check(r, log_decay, k, v, a, b, state, mask, cu_seqlens, backend, precision)
    backend = _choose(backend, r)
    if backend in _COMPILED:
        mask = None if mask is None else mask.bool()
        how = dict(mask=mask, cu_seqlens=cu_seqlens, precision=precision, inplace=inplace)
        return kernels.run(backend, r, log_decay, k, v, a, b, state, **how)
    k, v, a, b = (x if x.shape[2] == r.shape[2] else _to_heads(x, r.shape[2]) for x in (k, v, a, b))
    if mask is not None:
        pad = ~mask.bool()[:, :, None, None]
        log_decay, k, v, a, b = (x.masked_fill(pad, 0) for x in (log_decay, k, v, a, b))
    sequences = r.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
    if state is None:
        state = r.new_zeros(sequences, r.shape[2], r.shape[3], r.shape[3], dtype=dtype)
    if backend == "reference":
        y, state = wkv7_reference(r, log_decay, k, v, a, b, state, cu_seqlens)
    else:
        y, state = _Chunked.apply(r, log_decay, k, v, a, b, state.to(dtype), cu_seqlens)
    return (y if mask is None else y.masked_fill(pad, 0)), state


_COMPILED = ("native", "triton")


def refusal(backend: str, device: str, dtype: torch.dtype, head_size: int) -> str | None:
    """Why a backend cannot run on tensors of this device type, dtype and head size here; None when it can."""
    if backend not in _COMPILED:
        return None
    if kernels is None:
        return "the package rwkvinside is not installed"
    return _unavailable(backend) or kernels.unfit(backend, device, dtype, head_size)


def _choose(backend: str, r: Tensor) -> str:
    """What "auto" means for r, or the named backend if it can run."""
    given = (r.device.type, r.dtype, r.shape[3])
    if reason := refusal(backend, *given):
        raise RuntimeError(f"WKV-7 backend '{backend}' cannot run: {reason}; use 'auto' or 'chunked'")
    if backend == "auto":
        compiled = {"cpu": "native", "cuda": "triton"}.get(r.device.type)
        if compiled and kernels is not None and not kernels.unfit(compiled, *given):
            reason = _unavailable(compiled)
            if reason is None:
                return compiled
            _warn_once(f"WKV-7 runs on the slower chunked path: {reason}")
        return "reference" if r.shape[1] == 1 else "chunked"
    return backend


@torch.compiler.assume_constant_result
def _unavailable(backend: str) -> str | None:
    return kernels.unavailable(backend)


@torch.compiler.disable
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)  # Python shows the same warning of the same line once


def _to_heads(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[2], dim=2)


def wkv7_reference(r, log_decay, k, v, a, b, state, cu_seqlens=None) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, one step after the other; every faster path is judged by it. Arguments as
    `wkv7`."""
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        ys, states = [], []
        for s, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            part = (x[:, start:end] for x in (r, log_decay, k, v, a, b))
            y, final = wkv7_reference(*part, state[s : s + 1])
            ys.append(y)
            states.append(final)
        return torch.cat(ys, 1), torch.cat(states)
    dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
    out_dtype = v.dtype
    S = state.to(dtype)
    ys = []
    # unbind, not indexing: the backward of x[:, t] is a full-size zero tensor for each step
    for rt, wt, kt, vt, at, bt in zip(*(x.to(dtype).unbind(1) for x in (r, log_decay, k, v, a, b)), strict=True):
        removed = S @ at.unsqueeze(-1)
        S = S * wt.exp().unsqueeze(-2) + removed * bt.unsqueeze(-2) + vt.unsqueeze(-1) * kt.unsqueeze(-2)
        ys.append((S @ rt.unsqueeze(-1)).squeeze(-1))
    y = torch.stack(ys, 1) if ys else v.new_zeros(v.shape)
    return y.to(out_dtype), S


def _check(r, log_decay, k, v, a, b, state, mask, cu_seqlens, backend, precision) -> None:
    for name, value, allowed in (("backend", backend, BACKENDS), ("precision", precision, PRECISIONS)):
        if value not in allowed:
            raise ValueError(f"unknown WKV-7 {name} {value!r}: choose one of {', '.join(allowed)}")
    if log_decay.shape != r.shape:
        raise ValueError(f"log_decay has shape {tuple(log_decay.shape)}, r has {tuple(r.shape)}: they must agree")
    B, T, H, N = r.shape
    for name, x in (("k", k), ("v", v), ("a", a), ("b", b)):
        if x.dim() != 4 or x.shape[:2] != (B, T) or x.shape[3] != N or not x.shape[2] or H % x.shape[2]:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, r has {tuple(r.shape)}: all must be (B, T, H, N), or have a "
                f"number of heads that divides {H}"
            )
    sequences = B
    if cu_seqlens is not None:
        if B != 1:
            raise ValueError(f"cu_seqlens needs a batch of 1 (concatenate the rows), got {B}")
        # values on a GPU are not looked at: every layer would wait for it
        known = cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()
        if cu_seqlens.dim() != 1 or known and not _rises(cu_seqlens, T):
            raise ValueError(f"cu_seqlens must rise from 0 to T = {T}, got {cu_seqlens.tolist()[:8]}...")
        sequences = cu_seqlens.numel() - 1
    if state is not None and state.shape != (sequences, H, N, N):
        raise ValueError(f"state has shape {tuple(state.shape)}, expected {(sequences, H, N, N)}")
    if mask is not None and mask.shape != (B, T):
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected {(B, T)}")


def _rises(cu_seqlens: Tensor, T: int) -> bool:
    return bool(cu_seqlens[0] == 0 and cu_seqlens[-1] == T and (cu_seqlens.diff() >= 0).all())


class _Layout(NamedTuple):
    """How tokens lie in chunks. Chunks are ordered step by step: first the first chunk of every sequence (longest
    sequences first), then the second chunk of those that have one, and so on, so that each step of the scan is one
    contiguous slice."""

    length: int  # L, tokens per chunk
    counts: list[int]  # sequences that take part in step i; never rises
    index: Tensor | None  # (chunks, L) positions in the flattened tokens, -1 = padding; None: B equal rows
    order: Tensor | None  # (S,) sequence held by slot s of the scan; None: as they are

    def blocks(self, size: int):
        """Yields (first step, end step, first chunk, end chunk) for runs of steps of about `size` chunks."""
        step = chunk = 0
        while step < len(self.counts):
            first_step, first_chunk = step, chunk
            while step < len(self.counts) and (step == first_step or chunk - first_chunk < size):
                chunk += self.counts[step]
                step += 1
            yield first_step, step, first_chunk, chunk

    def fetch(self, x: Tensor, block, dtype: torch.dtype) -> Tensor:
        """(B, T, H, N) -> (chunks of the block, H, L, N), zero where a chunk has no token."""
        first_step, end_step, first_chunk, end_chunk = block
        B, T, H, N = x.shape
        L = self.length
        if self.index is not None:
            index = self.index[first_chunk:end_chunk]
            part = x.reshape(B * T, H, N)[index.clamp(min=0)].to(dtype).masked_fill((index < 0)[:, :, None, None], 0)
            return part.transpose(1, 2)
        part = x[:, first_step * L : end_step * L].to(dtype)
        if end_step * L > T:
            part = F.pad(part, (0, 0, 0, 0, 0, end_step * L - T))
        return part.view(B, end_step - first_step, L, H, N).permute(1, 0, 3, 2, 4).reshape(-1, H, L, N)

    def store(self, out: Tensor, value: Tensor, block) -> None:
        """The inverse of `fetch`: write (chunks, H, L, N) into the tokens of `out` (B, T, H, N)."""
        first_step, end_step, first_chunk, end_chunk = block
        B, T, H, N = out.shape
        L = self.length
        if self.index is not None:
            index = self.index[first_chunk:end_chunk]
            real = index >= 0
            out.view(B * T, H, N)[index[real]] = value.transpose(1, 2)[real].to(out.dtype)
            return
        value = value.view(end_step - first_step, B, H, L, N).permute(1, 0, 3, 2, 4).reshape(B, -1, H, N)
        out[:, first_step * L : end_step * L] = value[:, : T - first_step * L]


def _layout(B: int, T: int, L: int, cu_seqlens: Tensor | None) -> _Layout:
    if cu_seqlens is None:
        return _Layout(L, [B] * math.ceil(T / L), None, None)
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    chunks, order = ((lengths + L - 1) // L).sort(descending=True, stable=True)
    steps = torch.arange(int(chunks[0]), device=chunks.device)
    takes_part = chunks[None, :] > steps[:, None]  # (steps, S)
    step, slot = takes_part.nonzero(as_tuple=True)
    sequence = order[slot]
    within = step[:, None] * L + torch.arange(L, device=chunks.device)
    index = torch.where(within < lengths[sequence][:, None], starts[sequence][:, None] + within, -1)
    return _Layout(L, takes_part.sum(1).tolist(), index, order)


class _Local(NamedTuple):
    """What one chunk needs that does not depend on the state; names follow docs/wkv7.md. All (chunks, H, L, N or L)."""

    p: Tensor  # exp of the log decay summed up to and including the token, relative to the middle of the chunk
    pe: Tensor  # the same without the token's own decay
    r: Tensor  # r * p
    a: Tensor  # a * pe
    k: Tensor  # k / p
    b: Tensor  # b / p
    rk: Tensor
    rb: Tensor
    ak: Tensor
    ab: Tensor
    ec: Tensor  # from the start of the chunk to its middle
    g: Tensor  # from the middle to its end


def _causal(L: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(2L, 2L) of 0 and 1: rows r then a, columns k then b. r sees its own token, a only earlier ones."""
    ones = torch.ones(L, L, dtype=dtype, device=device)
    return torch.cat([ones.tril().repeat(1, 2), ones.tril(-1).repeat(1, 2)])


def _local(r, w, k, a, b) -> _Local:
    # The exponents are taken from the middle of the chunk, which halves their range; rounding is relative and
    # unaffected.
    L = r.shape[-2]
    c = w.cumsum(-2)
    middle, last = c[..., L // 2 : L // 2 + 1, :], c[..., -1:, :]
    c = c - middle
    p, pe, inverse = c.exp(), (c - w).exp(), (-c).exp()
    r, a, k, b = r * p, a * pe, k * inverse, b * inverse
    scores = (torch.cat([r, a], -2) @ torch.cat([k, b], -2).transpose(-1, -2)) * _causal(L, w.dtype, w.device)
    rk, rb, ak, ab = scores[..., :L, :L], scores[..., :L, L:], scores[..., L:, :L], scores[..., L:, L:]
    return _Local(p, pe, r, a, k, b, rk, rb, ak, ab, middle.exp(), (last - middle).exp())


def _solve(ab: Tensor, rhs: Tensor, transpose: bool = False) -> Tensor:
    """(I - ab)^-1 rhs, or with (I - ab)^T, by exact substitution: a Neumann product explodes on repeated keys."""
    system = torch.eye(ab.shape[-1], dtype=ab.dtype, device=ab.device) - ab
    system = system.transpose(-1, -2) if transpose else system
    return torch.linalg.solve_triangular(system, rhs, upper=transpose, unitriangular=True)


class _Chunked(torch.autograd.Function):
    """Affine scan over chunks: S' = S M + D with M, D from chunk-local products. Saves the inputs and the state before
    each chunk, and recomputes the rest in the backward (docs/wkv7.md has the derivation)."""

    LENGTH_SMALL, LENGTH = 16, 32  # tokens per chunk for N < 32 and above: measured, see docs/benchmarks.md
    BLOCK = 1 << 19  # elements of one (chunks, H, L, N) tensor that are worked on at a time: stays in the cache
    MIN_LOG_DECAY = -5.0  # 17 steps of this stay inside fp32 on either side of the middle of a chunk

    @staticmethod
    def forward(ctx, r, w, k, v, a, b, state, cu_seqlens):
        dtype = state.dtype
        B, T, H, N = r.shape
        if T and float(w.detach().amin()) < _Chunked.MIN_LOG_DECAY:
            raise ValueError(
                f"log_decay reaches {float(w.amin()):.3g}, the chunked path represents {_Chunked.MIN_LOG_DECAY} "
                "and above: clamp it or use backend='reference'"
            )
        L = _Chunked.LENGTH if N >= 32 else _Chunked.LENGTH_SMALL
        layout = _layout(B, T, L, cu_seqlens)
        S = (state if layout.order is None else state[layout.order]).clone()
        starts = torch.empty(sum(layout.counts), H, N, N, dtype=dtype, device=r.device)
        y = torch.empty_like(v, memory_format=torch.contiguous_format)
        with torch.autocast(r.device.type, enabled=False):
            for block in layout.blocks(max(1, _Chunked.BLOCK // (H * L * N))):
                R, W, K, V, A, Bb = (layout.fetch(x, block, dtype) for x in (r, w, k, v, a, b))
                q = _local(R, W, K, A, Bb)
                solved = _solve(q.ab, torch.cat([q.a * q.ec, q.ak @ V], -1))
                Wt, Ut = solved[..., :N], solved[..., N:]
                bg = q.b * q.g
                D = torch.cat([V, Ut], -2).transpose(-1, -2) @ torch.cat([q.k * q.g, bg], -2)
                M = Wt.transpose(-1, -2) @ bg
                M.diagonal(dim1=-2, dim2=-1).add_((q.ec * q.g).squeeze(-2))
                before = starts[block[2] : block[3]]
                at = 0
                for count in layout.counts[block[0] : block[1]]:
                    before[at : at + count] = S[:count]
                    S[:count] = S[:count] @ M[at : at + count] + D[at : at + count]
                    at += count
                before = before.transpose(-1, -2)
                U = Ut + Wt @ before
                out = (q.r * q.ec) @ before + torch.cat([q.rk, q.rb], -1) @ torch.cat([V, U], -2)
                layout.store(y, out, block)
        ctx.save_for_backward(r, w, k, v, a, b, starts)
        ctx.layout = layout
        final = S if layout.order is None else torch.empty_like(S).index_copy_(0, layout.order, S)
        return y, final

    @staticmethod
    def backward(ctx, dy, dfinal):
        r, w, k, v, a, b, starts = ctx.saved_tensors
        layout, dtype = ctx.layout, starts.dtype
        N, L = r.shape[-1], layout.length
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (r, w, k, v, a, b)]
        dS = dfinal.to(dtype)
        dS = (dS if layout.order is None else dS[layout.order]).clone()
        with torch.autocast(r.device.type, enabled=False):
            blocks = list(layout.blocks(max(1, _Chunked.BLOCK // (r.shape[2] * L * N))))
            for block in reversed(blocks):
                R, W, K, V, A, Bb, dY = (layout.fetch(x, block, dtype) for x in (r, w, k, v, a, b, dy))
                q = _local(R, W, K, A, Bb)
                before = starts[block[2] : block[3]]
                before_t = before.transpose(-1, -2)
                start_a = q.a * q.ec
                solved = _solve(q.ab, torch.cat([start_a, start_a @ before_t + q.ak @ V], -1))
                Wt, U = solved[..., :N], solved[..., N:]
                bg, kg = q.b * q.g, q.k * q.g
                decay = q.ec * q.g
                Mt = bg.transpose(-1, -2) @ Wt
                Mt.diagonal(dim1=-2, dim2=-1).add_(decay.squeeze(-2))
                E = dY.transpose(-1, -2) @ (q.r * q.ec + q.rb @ Wt)
                after = torch.empty_like(before)  # gradient of the state after each chunk
                end = block[3] - block[2]
                for count in reversed(layout.counts[block[0] : block[1]]):
                    after[end - count : end] = dS[:count]
                    dS[:count] = dS[:count] @ Mt[end - count : end] + E[end - count : end]
                    end -= count
                after_t = after.transpose(-1, -2)
                dU = q.rb.transpose(-1, -2) @ dY + bg @ after_t
                dP = _solve(q.ab, dU, transpose=True)
                YP, VU = torch.cat([dY, dP], -2), torch.cat([V, U], -2)
                dV = torch.cat([q.rk, q.ak], -2).transpose(-1, -2) @ YP + kg @ after_t
                dscores = (YP @ VU.transpose(-1, -2)) * _causal(L, dtype, r.device)
                drow = dscores @ torch.cat([q.k, q.b], -2) + (YP @ before) * q.ec  # of r * p and a * pe
                carried = (VU @ after) * q.g
                dcol = dscores.transpose(-1, -2) @ torch.cat([q.r, q.a], -2) + carried  # of k / p and b / p
                dr, da, dk, db = drow[..., :L, :], drow[..., L:, :], dcol[..., :L, :], dcol[..., L:, :]
                # A token's decay scales everything that crosses it: the sum over the tokens from it to the end of the
                # chunk.
                own_a = da * q.a
                crossing = dr * q.r - dk * q.k - db * q.b + own_a
                total = (carried[..., :L, :] * q.k + carried[..., L:, :] * q.b).sum(-2, keepdim=True)
                total = total + decay * (before * after).sum(-2, keepdim=True)
                dw = crossing.flip(-2).cumsum(-2).flip(-2) - own_a + total
                inverse = q.p.reciprocal()
                for grad, value in zip(grads, (dr * q.p, dw, dk * inverse, dV, da * q.pe, db * inverse), strict=True):
                    layout.store(grad, value, block)
        dstate = dS if layout.order is None else torch.empty_like(dS).index_copy_(0, layout.order, dS)
        return (*grads, dstate, None)
