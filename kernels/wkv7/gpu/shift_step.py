"""The token shift of stock RWKV-7 for one token in one Triton launch: what each map of a mixer reads, and the state.

A map reads x + (previous - x) mix with a mix of its own. In PyTorch that is three operations a map, and those of the
state. For inference only, there is no backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvinside.kernels.gpu.kernels import _store
from rwkvinside.kernels.gpu.launch import Launch, run
from rwkvinside.kernels.gpu.table import Tuning

COLUMNS = 256  # that a program computes for all maps
TUNING = Tuning(num_warps=2, num_stages=1)


@torch.library.custom_op("rwkvinside::shift_step", mutates_args={"last"})
def shift_step(x: Tensor, last: Tensor, mixes: list[Tensor], mask: Tensor | None = None) -> Tensor:
    """Mix one token of every row with the one before it, in fp32 from whatever the dtypes are.

    Args:
        x: (B, D).
        last: (B, D), contiguous, the last real token of every row; where this one is real it takes its place.
        mixes: D numbers for each map.
        mask: (B,) bool, True for real tokens; others count as 0.

    Returns:
        (maps, B, D) in x's dtype.

    Raises:
        ValueError: shapes, a dtype or a layout that do not fit.
    """
    return launch_shift_step(x, last, mixes, mask)


@shift_step.register_fake
def _(x, last, mixes, mask=None):
    return x.new_empty(len(mixes), *x.shape)


def launch_shift_step(x: Tensor, last: Tensor, mixes: list[Tensor], mask: Tensor | None = None) -> Tensor:
    """Do what `shift_step` does without an operator's bookkeeping; arguments as there."""
    launches, inputs = plan_shift_step(x, last, mixes, mask)
    run(launches, x.device)
    return inputs


def plan_shift_step(
    x: Tensor, last: Tensor, mixes: list[Tensor], mask: Tensor | None = None
) -> tuple[list[Launch], Tensor]:
    """Return the launches that `shift_step` runs, and its result; launch nothing.

    Meta tensors are enough. Arguments as there.
    """
    if x.dim() != 2 or last.shape != x.shape or not last.is_contiguous():
        raise ValueError(f"x has shape {tuple(x.shape)}, last {tuple(last.shape)}: both are (B, D), last contiguous")
    B, D = x.shape
    if sizes := {mix.numel() for mix in mixes} - {D}:
        raise ValueError(f"mixes have {sorted(sizes)} numbers, expected {D}")
    if any(given.dtype == torch.float64 for given in (x, last, *mixes)):
        raise ValueError("float64 is not computed: give fp32 or less")
    if mask is not None and (mask.shape != (B,) or mask.dtype != torch.bool or not mask.is_contiguous()):
        raise ValueError(f"mask has shape {tuple(mask.shape)} and {mask.dtype}, expected {(B,)} of bool, contiguous")
    inputs = x.new_empty(len(mixes), B, D)
    args = {"x": x.contiguous(), "last": last, "mixes": tuple(mix.contiguous() for mix in mixes), "mask": mask}
    args |= {"inputs": inputs, "rows": B}
    grid = (B * triton.cdiv(D, COLUMNS),)
    return [Launch(_shift_step, grid, args, {"D": D, "COLUMNS": COLUMNS}, TUNING)], inputs


@triton.jit
def _shift_step(x, last, mixes, mask, inputs, rows, D: tl.constexpr, COLUMNS: tl.constexpr):
    row = (tl.program_id(0) % rows).to(tl.int64)
    columns = tl.program_id(0) // rows * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < D
    places = row * D + columns
    new = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    before = tl.load(last + places, mask=inside, other=0.0).to(tl.float32)
    real = inside
    if mask is not None:
        real = inside & tl.load(mask + row)
        new = tl.where(real, new, 0.0)
    _store(last + places, new, real)
    for i in tl.static_range(len(mixes)):
        mix = tl.load(mixes[i] + columns, mask=inside, other=0.0).to(tl.float32)
        _store(inputs + (i * rows + row) * D + columns, new + (before - new) * mix, inside)
