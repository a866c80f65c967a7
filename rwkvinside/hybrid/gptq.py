"""4-bit weights chosen for the inputs that a layer really sees, in bitsandbytes' own format.

bitsandbytes rounds each weight to its nearest value. Three things lower the error of the model's output at no cost
later: a layer is fitted to what the original model would give at that place, so that it takes back errors of the layers
before it (as GPTAQ does, Li et al. 2025, arXiv 2504.02692); the scale of a block is searched; and the rounding error of
each column is made up for by the columns after it (GPTQ, Frantar et al. 2022, arXiv 2210.17323). docs/benchmarks.md
says what that is worth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .quantized_linear import codebook, pack_scales

SHRINK = torch.linspace(0.75, 1.0, 21)  # candidates for a block's scale, in units of its largest magnitude


DAMPING = 0.01  # of the mean second moment; a few thousand tokens do not determine thousands of inputs


COLUMNS = 128  # that are rounded before the rest of the matrix hears of it


STRENGTHS = (0.01, 0.1, 1.0, 10.0)  # of the pull towards the original weight, in units of the mean second moment


@torch.no_grad()
def refit(weight: Tensor, inputs: Tensor, wanted: Tensor) -> Tensor:
    """The weight near the given one whose outputs on the inputs are close to what is wanted.

    Ridge regression of what is missing. Its strength is the one that, fitted to one half of the tokens, leaves least
    missing in the other; where none of them helps there, as with fewer tokens than inputs, the weight stays.

    Args:
        weight: (out, in).
        inputs: (tokens, in).
        wanted: (tokens, out).
    """
    missing = wanted - inputs @ weight.t()
    half = len(inputs) // 2
    (fitted, judged), (known, left) = ((x[:half], x[half:]) for x in (inputs, missing))
    moments, products = fitted.t() @ fitted, fitted.t() @ known
    best, least = None, left.square().sum()
    for strength in STRENGTHS:
        error = (left - judged @ _ridge(moments, products, strength).t()).square().sum()
        if error < least:
            best, least = strength, error
    if best is None:
        return weight
    return weight + _ridge(moments + judged.t() @ judged, products + judged.t() @ left, best)


def _ridge(moments: Tensor, products: Tensor, strength: float) -> Tensor:
    """(out, in) of least squares, solved in fp64."""
    moments, products, dtype = moments.double(), products.double(), products.dtype
    mean = moments.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    eye = torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    factor = torch.linalg.cholesky(moments / mean + strength * eye)
    return torch.cholesky_solve(products / mean, factor).t().to(dtype)


@torch.no_grad()
def round_to_inputs(weight: Tensor, moments: Tensor, format: str, double: bool, block: int) -> dict[str, Tensor]:
    """The tensors of a `QuantizedLinear` whose output on given inputs is close to the original's.

    Args:
        weight: (out, in), any float dtype.
        moments: (in, in), the sum of x x^T over the inputs x.
        format, double, block: nf4 or fp4, see `quantization.pack`.

    Returns:
        As `pack`.
    """
    code = codebook(format, weight.device)
    weight, moments = weight.float(), moments.double()
    importance = moments.diagonal() / moments.diagonal().mean().clamp_min(1e-30)
    searched = _searched_scales(weight, importance.float(), code, block)
    tensors, scales = pack_scales(searched, double)
    each = scales.repeat_interleave(block)[: weight.numel()].view_as(weight)
    indices = _rounded(weight, each, moments, code).flatten()
    if indices.numel() % 2:
        indices = torch.cat([indices, indices.new_zeros(1)])
    pairs = indices.view(-1, 2)
    return {"packed": (pairs[:, :1] << 4) | pairs[:, 1:], **tensors}


def _searched_scales(weight: Tensor, importance: Tensor, code: Tensor, block: int) -> Tensor:
    """(blocks,) fp32: the scale of each block of consecutive weights with the least weighted squared error."""
    blocks, weights = (_blocks(x, block) for x in (weight, importance.expand_as(weight)))
    largest = blocks.abs().amax(1)
    best, least = largest, torch.full_like(largest, torch.inf)
    for shrink in SHRINK.tolist():
        scale = (shrink * largest).clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        error = (weights * (code[_nearest(blocks / scale, code)] * scale - blocks).square()).sum(1)
        best = torch.where(error <= least, scale[:, 0], best)  # of equal ones the largest
        least = torch.minimum(error, least)
    return best


def _blocks(values: Tensor, block: int) -> Tensor:
    flat = values.flatten()
    return torch.cat([flat, flat.new_zeros(-flat.numel() % block)]).view(-1, block)


def _rounded(weight: Tensor, scales: Tensor, moments: Tensor, code: Tensor) -> Tensor:
    """(out, in) indices into the code; columns of large inputs first, each one's error handed on to those after it."""
    order = moments.diagonal().argsort(descending=True)
    left, scales = weight[:, order], scales[:, order].clamp_min(torch.finfo(torch.float32).tiny)
    indices = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    share = _shares(moments[order][:, order]).float()
    for start in range(0, weight.shape[1], COLUMNS):
        part = slice(start, min(start + COLUMNS, weight.shape[1]))
        block, inner = left[:, part].clone(), share[part, part]
        errors = torch.empty_like(block)
        for j in range(block.shape[1]):
            scale = scales[:, start + j]
            chosen = _nearest(block[:, j] / scale, code)
            indices[:, start + j] = chosen
            errors[:, j] = (block[:, j] - code[chosen] * scale) / inner[j, j]
            block[:, j:] -= errors[:, j, None] * inner[j, j:]
        left[:, part.stop :] -= errors @ share[part, part.stop :]
    return indices[:, order.argsort()]


def _shares(moments: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse moments, fp64: how one column's error is best spread over later ones."""
    mean = moments.diagonal().mean()
    eye = torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    damped = moments / mean + DAMPING * eye if mean > 0 else eye
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def _nearest(units: Tensor, code: Tensor) -> Tensor:
    """Indices of the nearest values of the code, which need not be sorted."""
    ascending, where = code.sort()
    return where[torch.bucketize(units, (ascending[1:] + ascending[:-1]) / 2)]
