"""4-bit weights chosen for the inputs that a layer sees.

They are in bitsandbytes' format, which by itself rounds each weight to its nearest value. Three things lower the error
of the model's output at no cost later: a layer is fitted to what the original model would give at that place, so that
it takes back errors of the layers before it (as GPTAQ does, Li et al. 2025, arXiv 2504.02692); the scale of a block is
searched; and the error of each column is compensated by the columns after it (GPTQ, Frantar et al. 2022, arXiv
2210.17323). docs/benchmarks.md says what that is worth.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from ..support.progress import Progress
from .model import HybridModel
from .quantized_linear import QuantizedLinear, codebook, insert_quantized, pack_scales
from .settings import QuantizeConfig

SHRINK = torch.linspace(0.75, 1.0, 21)  # candidates for a block's scale, in units of its largest magnitude
DAMPING = 0.01  # of the mean second moment; a few thousand tokens do not determine thousands of inputs
COLUMNS = 128  # that are quantized before their errors reach the rest of the matrix
STRENGTHS = (0.01, 0.1, 1.0, 10.0)  # of the pull towards the original weight, in units of the mean second moment


@torch.no_grad()
def quantize_by_inputs(
    model: HybridModel, names: Sequence[str], text: Batch, config: QuantizeConfig, device: torch.device | None = None
) -> None:
    """Quantize linear layers for the inputs that a text brings them, in place.

    One copy of the text goes through the original layers, another through quantized ones. So each layer is chosen for
    the outputs of the quantized layers before it, and to come close to what the original model has there.

    Args:
        model: where the text is.
        names: canonical names of plain layers.
        text: rows without padding.
        config: nf4 or fp4.
        device: where to compute; None: where each weight is.
    """
    layers, family = model.linear_layers(), model.family
    progress = Progress("quantizing", len(names), unit="layers", stream=sys.stdout)
    walk = _Walk(model, config, device, progress.advance)
    paths = [layers[name] for name in names]
    hooks = [model.lm.get_submodule(path).register_forward_hook(walk.layer_hook(path)) for path in paths]
    if family.head_path in paths:
        hooks.append(family.final_norm(model.lm).register_forward_hook(walk.quantize_head))
    for layer in family.layers(model.lm):
        readers = (family.attention_input(layer), family.mlp_input(layer))
        hooks.extend(reader.register_forward_pre_hook(walk.note_stream) for reader in readers)
    mode = "align" if any(model.group_of(f"{name}.weight")[0] == "mixer" for name in names) else "teacher"
    # a teacher in 16 bits gives activations that the fp32 mixers next to it cannot take
    mixed = model.lm.dtype in (torch.bfloat16, torch.float16)
    with progress, torch.autocast(text.input_ids.device.type, dtype=torch.bfloat16, enabled=mixed):
        model(text.twice(), mode=mode)
    for hook in hooks:
        hook.remove()


class _Walk:
    """Hooks that quantize each layer when the text reaches it."""

    def __init__(
        self, model: HybridModel, config: QuantizeConfig, device: torch.device | None, advance: Callable[[], object]
    ):
        self.lm, self.family, self.config, self.device = model.lm, model.family, config, device
        self.advance = advance  # after every layer
        self.stream = torch.empty(0)  # what the running block will add its output to

    def note_stream(self, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Keep the residual stream that a block reads, before it does."""
        self.stream = args[0].detach()

    def layer_hook(self, path: str) -> Callable:
        """Return the hook that quantizes a layer; the second copy gets its new output."""

        def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            quantized = self.quantize(path, layer, args[0])
            return torch.cat([output.chunk(2)[0], quantized(args[0].chunk(2)[1]).to(output.dtype)])

        return hook

    def quantize_head(self, norm: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Quantize the head after the final norm, as it is not called without logits."""
        self.quantize(self.family.head_path, self.family.head(self.lm), output)

    def quantize(self, path: str, layer: nn.Linear, inputs: Tensor) -> QuantizedLinear:
        """Replace a layer by one that is quantized for both copies of its inputs."""
        config, home = self.config, layer.weight.device
        device = self.device or home
        with torch.autocast(device.type, enabled=False):
            original, quantized = _copies(inputs, device)
            weight = layer.weight.detach().to(device).float()
            target = original @ weight.t()
            # the last layer of a block can correct what is wrong in the stream before it
            if path.replace(".teacher_attn", "").endswith(self.family.block_ends):
                target += torch.sub(*_copies(self.stream, device)) / self.family.residual_scale(self.lm.config)
            fitted = refit(weight, quantized, target)
            tensors = gptq_pack(fitted, quantized.t() @ quantized, config.format, config.double, config.block)
        tensors = {name: tensor.to(home) for name, tensor in tensors.items()}
        inserted = insert_quantized(self.lm, path, config.format, tensors, config.block)
        self.advance()
        return inserted


def _copies(x: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return both copies of the text, (tokens, width) fp32 each."""
    first, second = x.detach().to(device).float().chunk(2)
    return first.flatten(0, -2), second.flatten(0, -2)


@torch.no_grad()
def refit(weight: Tensor, inputs: Tensor, target: Tensor, strengths: Sequence[float] = STRENGTHS) -> Tensor:
    """Return a weight near the given one whose outputs come closer to a target.

    Ridge regression of the difference. Its strength is the one that, fitted to one half of the tokens, leaves least in
    the other; where none of them helps there, as with fewer tokens than inputs, the weight stays.

    Args:
        weight: (out, in).
        inputs: (tokens, in).
        target: (tokens, out).
        strengths: to choose from.
    """
    difference = target - inputs @ weight.t()
    half = len(inputs) // 2
    (fit_inputs, test_inputs), (fit_difference, test_difference) = ((x[:half], x[half:]) for x in (inputs, difference))
    moments, products = fit_inputs.t() @ fit_inputs, fit_inputs.t() @ fit_difference
    best, least = None, test_difference.square().sum()
    for strength in strengths:
        error = (test_difference - test_inputs @ _ridge(moments, products, strength).t()).square().sum()
        if error < least:
            best, least = strength, error
    if best is None:
        return weight
    return weight + _ridge(moments + test_inputs.t() @ test_inputs, products + test_inputs.t() @ test_difference, best)


def _ridge(moments: Tensor, products: Tensor, strength: float) -> Tensor:
    """Return the (out, in) of least squares, solved in fp64."""
    moments, products, dtype = moments.double(), products.double(), products.dtype
    mean = moments.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    eye = torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    factor = torch.linalg.cholesky(moments / mean + strength * eye)
    return torch.cholesky_solve(products / mean, factor).t().to(dtype)


@torch.no_grad()
def gptq_pack(weight: Tensor, moments: Tensor, format: str, double: bool, block: int) -> dict[str, Tensor]:
    """Return what `pack` returns, with values that suit the inputs of the layer.

    Args:
        weight: (out, in), any float dtype.
        moments: (in, in), the sum of x x^T over the inputs x.
        format, double, block: nf4 or fp4, see `quantized_linear.pack`.
    """
    code = codebook(format, weight.device)
    weight, moments = weight.float(), moments.double()
    importance = moments.diagonal() / moments.diagonal().mean().clamp_min(1e-30)
    searched = _search_scales(weight, importance.float(), code, block)
    tensors, scales = pack_scales(searched, double)
    scale_of_weight = scales.repeat_interleave(block)[: weight.numel()].view_as(weight)
    indices = _quantize_columns(weight, scale_of_weight, moments, code).flatten()
    if indices.numel() % 2:
        indices = torch.cat([indices, indices.new_zeros(1)])
    pairs = indices.view(-1, 2)
    return {"packed": (pairs[:, :1] << 4) | pairs[:, 1:], **tensors}


def _search_scales(weight: Tensor, importance: Tensor, code: Tensor, block: int) -> Tensor:
    """Return each block's scale of least weighted squared error, (blocks,) fp32."""
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


def _quantize_columns(weight: Tensor, scales: Tensor, moments: Tensor, code: Tensor) -> Tensor:
    """Return indices (out, in) into the code.

    Columns of large inputs come first; the error of each is handed on to those after it.
    """
    order = moments.diagonal().argsort(descending=True)
    remaining, scales = weight[:, order], scales[:, order].clamp_min(torch.finfo(torch.float32).tiny)
    indices = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    share = _error_shares(moments[order][:, order]).float()
    for start in range(0, weight.shape[1], COLUMNS):
        columns = slice(start, min(start + COLUMNS, weight.shape[1]))
        block, block_share = remaining[:, columns].clone(), share[columns, columns]
        errors = torch.empty_like(block)
        for j in range(block.shape[1]):
            scale = scales[:, start + j]
            nearest = _nearest(block[:, j] / scale, code)
            indices[:, start + j] = nearest
            errors[:, j] = (block[:, j] - code[nearest] * scale) / block_share[j, j]
            block[:, j:] -= errors[:, j, None] * block_share[j, j:]
        remaining[:, columns.stop :] -= errors @ share[columns, columns.stop :]
    return indices[:, order.argsort()]


def _error_shares(moments: Tensor) -> Tensor:
    """Return how the error of a column is best spread over later ones, (in, in) fp64.

    It is the upper Cholesky factor of the inverse moments.
    """
    mean = moments.diagonal().mean()
    eye = torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    damped = moments / mean + DAMPING * eye if mean > 0 else eye
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def _nearest(units: Tensor, code: Tensor) -> Tensor:
    """Return indices of the nearest values of the code, which need not be sorted."""
    ascending, where = code.sort()
    return where[torch.bucketize(units, (ascending[1:] + ascending[:-1]) / 2)]
