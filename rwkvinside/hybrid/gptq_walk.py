"""Quantizes the student's layers one by one as a text reaches them; what is done to a layer is in `rounding`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from .gptq import refit, round_to_inputs
from .model import HybridModel
from .quantized_linear import QuantizedLinear, use


@torch.no_grad()
def round_layers(
    model: HybridModel,
    names: Sequence[str],
    text: Batch,
    format: str,
    double: bool,
    block: int,
    device: torch.device | None = None,
) -> None:
    """Quantize linear layers for the inputs that a text brings them, in place.

    One copy of the text goes through the original layers, another through quantized ones; so each layer is chosen for
    what the quantized ones before it hand on, and to come close to what the original model has there.

    Args:
        names: canonical names of plain layers.
        text: rows without padding, where the model is.
        format, double, block: nf4 or fp4, see `quantization.pack`.
        device: where to compute; None: where each weight is.
    """
    layers, family = model.linear_layers(), model.family
    walk = _Walk(model, format, double, block, device)
    paths = [layers[name] for name in names]
    hooks = [model.lm.get_submodule(path).register_forward_hook(walk.layer(path)) for path in paths]
    if family.head_path in paths:
        hooks.append(family.final_norm(model.lm).register_forward_hook(walk.head))
    for layer in family.layers(model.lm):
        readers = (family.attention_input(layer), family.mlp_input(layer))
        hooks.extend(reader.register_forward_pre_hook(walk.block_begins) for reader in readers)
    mode = "align" if any(model.group_of(f"{name}.weight")[0] == "mixer" for name in names) else "teacher"
    # in 16 bits the teacher's weights are that still, which the fp32 mixers beside them cannot take
    mixed = model.lm.dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(text.input_ids.device.type, dtype=torch.bfloat16, enabled=mixed):
        model(text.twice(), mode=mode)
    for hook in hooks:
        hook.remove()


class _Walk:
    def __init__(self, model: HybridModel, format: str, double: bool, block: int, device: torch.device | None):
        self.lm, self.family, self.device = model.lm, model.family, device
        self.format, self.double, self.block = format, double, block
        self.stream = torch.empty(0)  # what the block that is running will add its output to

    def block_begins(self, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Pre-hook of what reads the residual stream for a block."""
        self.stream = args[0].detach()

    def layer(self, path: str) -> Callable:
        """Hook of a layer: quantizes it when it is called; its output for the second copy is then the new one."""

        def called(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            quantized = self.quantize(path, layer, args[0])
            return torch.cat([output.chunk(2)[0], quantized(args[0].chunk(2)[1]).to(output.dtype)])

        return called

    def head(self, norm: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Hook of the last norm: quantizes what reads its output, which a forward without logits does not call."""
        self.quantize(self.family.head_path, self.family.head(self.lm), output)

    def quantize(self, path: str, layer: nn.Linear, inputs: Tensor) -> QuantizedLinear:
        home = layer.weight.device
        device = self.device or home
        with torch.autocast(device.type, enabled=False):
            original, seen = _copies(inputs, device)
            weight = layer.weight.detach().to(device).float()
            wanted = original @ weight.t()
            # the end of a block can make good what is wrong in the stream before it
            if path.replace(".teacher_attn", "").endswith(self.family.block_ends):
                wanted += torch.sub(*_copies(self.stream, device))
            fitted = refit(weight, seen, wanted)
            tensors = round_to_inputs(fitted, seen.t() @ seen, self.format, self.double, self.block)
        return use(self.lm, path, self.format, {name: t.to(home) for name, t in tensors.items()}, self.block)


def _copies(x: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Both copies of the text, (tokens, width) fp32 each."""
    first, second = x.detach().to(device).float().chunk(2)
    return first.flatten(0, -2), second.flatten(0, -2)
