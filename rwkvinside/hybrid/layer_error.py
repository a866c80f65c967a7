"""How far a mixer's output is from the attention's that it learns to replace.

On a GPU one Triton launch computes it and another its gradient; the PyTorch code is their reference, and what every
other device runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import why_unavailable

FUSED = (torch.bfloat16, torch.float16, torch.float32)


def squared_error(output: Tensor, target: Tensor, mask: Tensor | None, backend: str) -> Tensor:
    """Return the sum over real tokens of the squared difference, 0-d, in fp32 (fp64 for fp64 inputs).

    Args:
        output, target: (B, T, D), their dtypes may differ. The target gets no gradient.
        mask: (B, T) bool, True for real tokens; None: all are.
        backend: of the mixer. With "auto" the Triton kernels run on a GPU that can, with "triton" in Triton's
            interpreter, too; the others are PyTorch code.
    """
    by_choice = backend == "triton" or backend == "auto" and output.device.type == "cuda"
    if by_choice and {output.dtype, target.dtype} <= set(FUSED) and why_unavailable("triton") is None:
        from ..kernels.gpu.squared_error import squared_error  # needs triton

        return squared_error(output, target, mask)
    return squares(_widened(output) - target.detach(), mask)  # of types that differ: no copy of the target


def squares(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the sum of squares over real tokens of x (B, T, D), 0-d, in fp32 (fp64 for fp64)."""
    x = _widened(x)
    if mask is not None:
        x = x.masked_fill(~mask[..., None], 0)  # before the squares: else NaN there would be the gradient's
    return x.square().sum(-1).sum()


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
