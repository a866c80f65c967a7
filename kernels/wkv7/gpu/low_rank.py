"""The low-rank maps of a mixer for a few tokens: all products with the first matrices in one launch, then all others.

A map is act(x down) up. For one token each product reads a matrix once and takes less time than its launch, and a mixer
has up to ten of them. For inference only, there is no backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvinside.kernels.gpu.kernels import _store
from rwkvinside.kernels.gpu.launch import Launch, run
from rwkvinside.kernels.gpu.table import Tuning

MAX_ROWS = 8  # every row reads the matrices again: from here on, products of whole batches are faster
ACTIVATIONS = ("none", "tanh", "sigmoid")
# Columns that a program computes, rows of a matrix that it takes at a time, warps
DOWN = {"COLUMNS": 16, "DEPTH": 512}, 8
UP = {"COLUMNS": 64, "DEPTH": 64}, 4


def low_rank(
    x: Tensor | Sequence[Tensor], downs: Sequence[Tensor], ups: Sequence[Tensor], activations: Sequence[str]
) -> list[Tensor]:
    """Compute act(x down) up for several maps, in fp32 from whatever the dtypes are.

    Args:
        x: (B, D) with B at most `MAX_ROWS`, or a list of them, one for each map.
        downs: (D, rank) each.
        ups: (rank, width) each.
        activations: "none", "tanh" or "sigmoid" each.

    Returns:
        (B, width) each, in x's dtype.

    Raises:
        ValueError: shapes that do not fit, an unknown activation.
    """
    launches, outputs = plan_low_rank(x, downs, ups, activations)
    run(launches, outputs[0].device)
    return outputs


def plan_low_rank(
    x: Tensor | Sequence[Tensor], downs: Sequence[Tensor], ups: Sequence[Tensor], activations: Sequence[str]
) -> tuple[list[Launch], list[Tensor]]:
    """Return the launches that `low_rank` runs, and its results; launch nothing.

    Meta tensors are enough.
    """
    xs = [x] * len(downs) if isinstance(x, Tensor) else x
    x = xs[0]
    if x.dim() != 2 or x.shape[0] > MAX_ROWS:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, D) with B at most {MAX_ROWS}")
    if len(shapes := {tuple(other.shape) for other in xs}) > 1:
        raise ValueError(f"inputs of the maps have shapes {sorted(shapes)}: they must agree")
    B, D = x.shape
    for down, up, activation in zip(downs, ups, activations, strict=True):
        if down.shape[0] != D or down.shape[1] != up.shape[0] or activation not in ACTIVATIONS:
            shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
            raise ValueError(f"a map has matrices {shapes} and activation {activation!r}, x has {tuple(x.shape)}")
    ranks, widths = tuple(down.shape[1] for down in downs), tuple(up.shape[1] for up in ups)
    hidden = torch.empty(B, sum(ranks), dtype=torch.float32, device=x.device)
    outputs = [torch.empty(B, width, dtype=x.dtype, device=x.device) for width in widths]
    down_args = {
        "xs": tuple(x.contiguous() for x in xs),
        "downs": tuple(w.contiguous() for w in downs),
        "hidden": hidden,
    }
    up_args = {"hidden": hidden, "ups": tuple(w.contiguous() for w in ups), "outputs": tuple(outputs)}
    kinds = tuple(ACTIVATIONS.index(activation) for activation in activations)
    launches = []
    for kernel, (sizes, warps), counts, args, constants in (
        (_down, DOWN, ranks, down_args, {"RANKS": ranks, "ACTIVATIONS": kinds, "D": D}),
        (_up, UP, widths, up_args, {"RANKS": ranks, "WIDTHS": widths}),
    ):
        tiles = sum(triton.cdiv(count, sizes["COLUMNS"]) for count in counts)
        launches.append(Launch(kernel, (tiles, B), args, constants | sizes, Tuning(warps, 1)))
    return launches, outputs


@triton.jit
def _product(x, w, columns, LENGTH: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr):
    """Multiply x (LENGTH) by some columns of w (LENGTH, WIDTH), in fp32."""
    total = tl.zeros([DEPTH, columns.shape[0]], tl.float32)
    for start in tl.range(0, LENGTH, DEPTH, loop_unroll_factor=4):  # so that several loads are under way
        rows = start + tl.arange(0, DEPTH)
        inside = (rows < LENGTH)[:, None] & (columns < WIDTH)[None, :]
        part = tl.load(w + rows[:, None] * WIDTH + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        total += part * tl.load(x + rows, mask=rows < LENGTH, other=0.0).to(tl.float32)[:, None]
    return tl.sum(total, axis=0)


@triton.jit
def _tile(tile, SIZES: tl.constexpr, i: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the columns of matrix i that a tile has, and whether it has any; tiles go over all in turn."""
    first: tl.constexpr = _sum(SIZES, i, COLUMNS)
    last: tl.constexpr = _sum(SIZES, i + 1, COLUMNS)
    return (tile - first) * COLUMNS + tl.arange(0, COLUMNS), (tile >= first) & (tile < last)


@triton.jit
def _down(
    xs,
    downs,
    hidden,
    ACTIVATIONS: tl.constexpr,
    D: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    hidden += tl.program_id(1) * _sum(RANKS, len(RANKS), 1)
    for i in tl.static_range(len(RANKS)):
        columns, mine = _tile(tl.program_id(0), RANKS, i, COLUMNS)
        if mine:
            value = _product(xs[i] + tl.program_id(1) * D, downs[i], columns, D, RANKS[i], DEPTH)
            if ACTIVATIONS[i] == 1:
                value = 2.0 * tl.sigmoid(2.0 * value) - 1.0  # tanh
            elif ACTIVATIONS[i] == 2:
                value = tl.sigmoid(value)
            tl.store(hidden + _sum(RANKS, i, 1) + columns, value, mask=columns < RANKS[i])


@triton.jit
def _up(
    hidden,
    ups,
    outputs,
    WIDTHS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    hidden += tl.program_id(1) * _sum(RANKS, len(RANKS), 1)
    for i in tl.static_range(len(RANKS)):
        columns, mine = _tile(tl.program_id(0), WIDTHS, i, COLUMNS)
        if mine:
            value = _product(hidden + _sum(RANKS, i, 1), ups[i], columns, RANKS[i], WIDTHS[i], DEPTH)
            _store(outputs[i] + tl.program_id(1) * WIDTHS[i] + columns, value, columns < WIDTHS[i])


@triton.constexpr_function
def _sum(sizes, count, unit):
    """Return the number of whole units that the first `count` sizes take."""
    return sum(-(-size // unit) for size in sizes[:count])
