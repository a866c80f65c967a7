"""WKV-7 as matrix products over chunks of tokens, in PyTorch alone.

docs/wkv7.md has the derivation. Reached through `wkv7` in wkv7.py. This file travels with exported models: torch only,
no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_Block = tuple[int, int, int, int]  # first step, end step, first chunk, end chunk


class _Layout(NamedTuple):
    """How tokens lie in chunks.

    Chunks are ordered step by step: first the first chunk of every sequence (longest sequences first), then the second
    chunk of those that have one, and so on, so that each step of the scan is one contiguous slice.
    """

    length: int  # L, tokens per chunk
    counts: list[int]  # sequences that take part in step i; never rises
    token_index: Tensor | None  # (chunks, L) positions in the flattened tokens, -1 = padding; None: B equal rows
    order: Tensor | None  # (S,) sequence held by slot s of the scan; None: as they are

    def blocks(self, size: int) -> Iterator[_Block]:
        """Yield a block for each run of steps that has about `size` chunks."""
        step = chunk = 0
        while step < len(self.counts):
            first_step, first_chunk = step, chunk
            while step < len(self.counts) and (step == first_step or chunk - first_chunk < size):
                chunk += self.counts[step]
                step += 1
            yield first_step, step, first_chunk, chunk

    def fetch(self, x: Tensor, block: _Block, dtype: torch.dtype) -> Tensor:
        """Return the chunks (chunks, H, L, N) of a block of x (B, T, H, N).

        They are zero where a chunk has no token.
        """
        first_step, end_step, first_chunk, end_chunk = block
        B, T, H, N = x.shape
        L = self.length
        if self.token_index is not None:
            index = self.token_index[first_chunk:end_chunk]
            tokens = x.reshape(B * T, H, N)[index.clamp(min=0)].to(dtype)
            return tokens.masked_fill((index < 0)[:, :, None, None], 0).transpose(1, 2)
        tokens = x[:, first_step * L : end_step * L].to(dtype)
        if end_step * L > T:
            tokens = F.pad(tokens, (0, 0, 0, 0, 0, end_step * L - T))
        return tokens.view(B, end_step - first_step, L, H, N).permute(1, 0, 3, 2, 4).reshape(-1, H, L, N)

    def store(self, out: Tensor, value: Tensor, block: _Block) -> None:
        """Write chunks (chunks, H, L, N) into `out` (B, T, H, N), as `fetch` read them."""
        first_step, end_step, first_chunk, end_chunk = block
        B, T, H, N = out.shape
        L = self.length
        if self.token_index is not None:
            index = self.token_index[first_chunk:end_chunk]
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
    """What one chunk needs that does not depend on the state.

    All are (chunks, H, L, N or L); names follow docs/wkv7.md.
    """

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
    """Return (2L, 2L) of 0 and 1: rows r then a, columns k then b.

    r sees its own token, a only earlier ones.
    """
    ones = torch.ones(L, L, dtype=dtype, device=device)
    return torch.cat([ones.tril().repeat(1, 2), ones.tril(-1).repeat(1, 2)])


def _local(r: Tensor, w: Tensor, k: Tensor, a: Tensor, b: Tensor) -> _Local:
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
    """Return (I - ab)^-1 rhs, or with (I - ab)^T, by exact substitution.

    A Neumann product would explode on repeated keys.
    """
    system = torch.eye(ab.shape[-1], dtype=ab.dtype, device=ab.device) - ab
    system = system.transpose(-1, -2) if transpose else system
    return torch.linalg.solve_triangular(system, rhs, upper=transpose, unitriangular=True)


class Chunked(torch.autograd.Function):
    """Affine scan over chunks: S' = S M + D with M, D from chunk-local products.

    Saves the inputs and the state before each chunk, and recomputes the rest in the backward (docs/wkv7.md has the
    derivation).
    """

    LENGTH_SMALL, LENGTH = 16, 32  # tokens per chunk for N < 32 and above: measured, see docs/benchmarks.md
    BLOCK = 1 << 19  # elements of one (chunks, H, L, N) tensor that are worked on at a time: stays in the cache
    MIN_LOG_DECAY = -5.0  # 17 steps of this stay inside fp32 on either side of the middle of a chunk

    @staticmethod
    def forward(
        ctx: Any,
        r: Tensor,
        w: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        state: Tensor,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return y and the final state.

        Arguments as of `wkv7`; `state` is in the dtype to compute in.
        """
        dtype = state.dtype
        B, T, H, N = r.shape
        # values on a GPU are not looked at: every layer would wait for it
        if T and w.device.type == "cpu" and float(w.detach().amin()) < Chunked.MIN_LOG_DECAY:
            raise ValueError(
                f"log_decay reaches {float(w.amin()):.3g}, the chunked path represents {Chunked.MIN_LOG_DECAY} "
                "and above: clamp it or use backend='reference'"
            )
        L = Chunked.LENGTH if N >= 32 else Chunked.LENGTH_SMALL
        layout = _layout(B, T, L, cu_seqlens)
        S = (state if layout.order is None else state[layout.order]).clone()
        starts = torch.empty(sum(layout.counts), H, N, N, dtype=dtype, device=r.device)
        y = torch.empty_like(v, memory_format=torch.contiguous_format)
        with torch.autocast(r.device.type, enabled=False):
            for block in layout.blocks(max(1, Chunked.BLOCK // (H * L * N))):
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
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of all inputs."""
        r, w, k, v, a, b, starts = ctx.saved_tensors
        layout, dtype = ctx.layout, starts.dtype
        N, L = r.shape[-1], layout.length
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (r, w, k, v, a, b)]
        dS = dfinal.to(dtype)
        dS = (dS if layout.order is None else dS[layout.order]).clone()
        with torch.autocast(r.device.type, enabled=False):
            blocks = list(layout.blocks(max(1, Chunked.BLOCK // (r.shape[2] * L * N))))
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
