"""The squared error of a layer's output to its target, in one launch forward and one backward.

    error = sum over real tokens |output - target|^2         gradient by output   2 (output - target)

A program of the forward owns a few tokens. It reads both once, adds up squares in fp32, and writes the difference in
the output's dtype for the backward: half of what both in bf16 would take to keep, and as much to write and read again
as to read them again. No atomics: two runs agree bit for bit. The reference is `rwkvinside.hybrid.layer_error`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvinside.kernels.gpu.kernels import INTERPRETED, _store
from rwkvinside.kernels.gpu.launch import Launch, run
from rwkvinside.kernels.gpu.table import Tuning

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Elements of a program at a time, and columns of them at most: 32 bytes of bf16 a thread and tensor (none else tried)
TILE, COLUMNS = 4096, 1024
TUNING = Tuning(num_warps=8, num_stages=1)
# No specialized variant for each number of tokens, nor for where in memory a mask or one layer's gradient begins
RUNTIME = ["T", "TOKENS", "mask_", "mask_b", "dvalue_"]


def squared_error(output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the sum over real tokens of the squared difference, 0-d fp32, with gradient to the output only.

    For the backward it keeps the difference in the output's dtype; there is no second derivative.

    Args:
        output, target: (B, T, D), each bf16, fp16 or fp32, with any strides of batch and time.
        mask: (B, T) bool, True for real tokens; others are not read, and their gradient is 0. None: all are real.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        RuntimeError: tensors that are not on a GPU, outside of Triton's interpreter.
    """
    _check(output, target, mask)
    return _error(output, target.detach(), mask, torch.is_grad_enabled() and output.requires_grad)[0]


def plan_error(
    output: Tensor, target: Tensor, mask: Tensor | None, keep: bool
) -> tuple[list[Launch], tuple[Tensor, Tensor]]:
    """Return the launch of the forward, the sums of its programs (programs,) fp32, and the difference; launch nothing.

    Meta tensors are enough.

    Args:
        output, target, mask: as of `squared_error`.
        keep: False: the difference has no elements, and is not written.
    """
    _, T, D = output.shape
    tokens = output.shape[0] * T
    columns = min(triton.next_power_of_2(D), COLUMNS)
    rows = TILE // columns
    sums = output.new_empty(triton.cdiv(tokens, rows), dtype=torch.float32)
    difference = _difference(output, keep)
    # (bool loads differ between the interpreter and the compiler)
    args = {"mask_": None if mask is None else mask.view(torch.uint8)}
    args |= {"mask_b": 0 if mask is None else mask.stride(0), "mask_t": 0 if mask is None else mask.stride(1)}
    for name, x in (("output", output), ("target", target)):
        x = x if x.stride(2) == 1 else x.contiguous()
        args |= {f"{name}_": x, f"{name}_b": x.stride(0), f"{name}_t": x.stride(1)}
    args |= {"difference_": difference if keep else None, "sums_": sums, "T": T, "TOKENS": tokens}
    constants = {"D": D, "ROWS": rows, "COLUMNS": columns}
    return [Launch(squared_error_forward, (len(sums),), args, constants, TUNING)], (sums, difference)


def plan_error_backward(difference: Tensor, dvalue: Tensor) -> tuple[list[Launch], Tensor]:
    """Return the launch of the backward and the output's gradient; launch nothing.

    Args:
        difference: that the forward kept.
        dvalue: 0-d, gradient of the error; read on the device.
    """
    doutput = torch.empty_like(difference)
    args = {"difference_": difference, "dvalue_": dvalue, "doutput_": doutput, "COUNT": difference.numel()}
    grid = (triton.cdiv(difference.numel(), TILE),)
    return [Launch(squared_error_backward, grid, args, {"TILE": TILE}, TUNING)], doutput


def _difference(output: Tensor, keep: bool) -> Tensor:
    """Return where the difference goes, contiguous; without elements if it is not kept."""
    return output.new_empty(output.shape if keep else 0)


@torch.library.custom_op("rwkvinside::squared_error_triton", mutates_args=())
def _error(output: Tensor, target: Tensor, mask: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
    launches, (sums, difference) = plan_error(output, target, mask, keep)
    run(launches, output.device)
    return sums.sum(), difference


@_error.register_fake
def _(output, target, mask, keep):
    return output.new_empty((), dtype=torch.float32), _difference(output, keep)


@torch.library.custom_op("rwkvinside::squared_error_triton_backward", mutates_args=())
def _error_backward(difference: Tensor, dvalue: Tensor) -> Tensor:
    launches, doutput = plan_error_backward(difference, dvalue)
    run(launches, difference.device)
    return doutput


@_error_backward.register_fake
def _(difference, dvalue):
    return torch.empty_like(difference)


def _setup(ctx, inputs, output) -> None:
    _, difference = output
    ctx.set_materialize_grads(False)  # no zeros for the gradient of the difference, which is only saved
    ctx.mark_non_differentiable(difference)
    ctx.save_for_backward(difference)


def _differentiate(ctx, dvalue, ddifference):
    (difference,) = ctx.saved_tensors
    return _error_backward(difference, dvalue), None, None, None


_error.register_autograd(_differentiate, setup_context=_setup)


def _check(output: Tensor, target: Tensor, mask: Tensor | None) -> None:
    if output.dim() != 3 or target.shape != output.shape:
        raise ValueError(
            f"output has shape {tuple(output.shape)} and target {tuple(target.shape)}: expected (B, T, D) of both"
        )
    for name, x in (("output", output), ("target", target)):
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} is {x.dtype}: the kernels take bfloat16, float16 and float32")
    if mask is not None and (mask.shape != output.shape[:2] or mask.dtype != torch.bool):
        raise ValueError(
            f"mask is {mask.dtype} of shape {tuple(mask.shape)}: expected bool of shape {tuple(output.shape[:2])}"
        )
    if output.device.type != "cuda" and not INTERPRETED.value:
        raise RuntimeError(f"the Triton kernels need a CUDA device, output is on {output.device}")


@triton.jit(do_not_specialize=RUNTIME)
def squared_error_forward(
    output_, output_b, output_t, target_, target_b, target_t, mask_, mask_b, mask_t, difference_, sums_, T, TOKENS,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum the squares of a block of tokens, and write their difference, which is 0 for tokens that are not real."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = token < TOKENS
    b, t = token // T, token % T
    real = there
    if mask_ is not None:
        real &= tl.load(mask_ + b * mask_b + t * mask_t, mask=there, other=0) != 0
    output_ += b[:, None] * output_b + t[:, None] * output_t
    target_ += b[:, None] * target_b + t[:, None] * target_t
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, D, COLUMNS):
        column = (start + tl.arange(0, COLUMNS))[None, :]
        inside = column < D
        x = tl.load(output_ + column, mask=real[:, None] & inside, other=0.0).to(tl.float32)
        x -= tl.load(target_ + column, mask=real[:, None] & inside, other=0.0).to(tl.float32)
        squares += x * x
        if difference_ is not None:
            _store(difference_ + token[:, None] * D + column, x, there[:, None] & inside)
    tl.store(sums_ + tl.program_id(0), tl.sum(tl.sum(squares, axis=1), axis=0))


@triton.jit(do_not_specialize=RUNTIME)
def squared_error_backward(difference_, dvalue_, doutput_, COUNT, TILE: tl.constexpr):
    """Scale a block of the difference by twice the gradient of the error."""
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    x = tl.load(difference_ + place, mask=place < COUNT, other=0.0).to(tl.float32)
    _store(doutput_ + place, x * (2.0 * tl.load(dvalue_)), place < COUNT)
