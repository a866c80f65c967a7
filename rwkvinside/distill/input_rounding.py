"""Quantises the student's layers one by one as a text reaches them; what is done to a layer is in `rounding`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..quantization import QuantizedLinear, use
from ..rounding import refit, round_to_inputs
from .hybrid import HybridModel

Probe = Callable[[HybridModel, str, Callable[[Tensor, nn.Module], object]], object]
"""Runs the model on some text, its rows twice over (`Batch.twice`), in a mode, with a readout."""

# Layers whose output is added to the residual stream, in every family that can be a teacher.
ENDS_OF_BLOCKS = ("self_attn.o_proj", "teacher_attn.o_proj", "mlp.down_proj")


@torch.no_grad()
def round_layers(
    model: HybridModel,
    names: Sequence[str],
    probe: Probe,
    format: str,
    double: bool,
    block: int,
    device: torch.device | None = None,
) -> None:
    """Quantise linear layers for the inputs that a text brings them, in place.

    The first copy of the text goes through the original layers, the second through quantised ones; so each layer is
    chosen for what the quantised ones before it hand on, and to come close to what the original model has there.

    Args:
        names: canonical names of plain layers; one that the text does not reach stays plain.
        probe: runs the text.
        format, double, block: nf4 or fp4, see `quantization.pack`.
        device: where to compute; None: where each weight is.
    """
    layers = model.linear_layers()
    walk = _Walk(model.lm, partial(round_to_inputs, format=format, double=double, block=block), format, block, device)
    hooks = [model.lm.get_submodule(layers[name]).register_forward_hook(walk.hook(layers[name])) for name in names]
    for layer in model.lm.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            hooks.append(norm.register_forward_pre_hook(walk.enter))
    groups = {model.group_of(f"{name}.weight")[0] for name in names}
    modes = [mode for mode, wanted in (("align", "mixer" in groups), ("teacher", groups != {"mixer"})) if wanted]
    for mode in modes:
        probe(model, mode, lambda hidden, head: "head" in groups and walk.quantise("lm_head", head, hidden))
    for hook in hooks:
        hook.remove()


class _Walk:
    def __init__(self, lm: nn.Module, rounding: Callable, format: str, block: int, device: torch.device | None):
        self.lm, self.rounding, self.format, self.block, self.device = lm, rounding, format, block, device
        self.stream = torch.empty(0)  # what the block that is running will add its output to

    def enter(self, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        """A block begins."""
        self.stream = args[0].detach()

    def hook(self, path: str) -> Callable:
        """Quantises the layer at a path when it is called; its output for the second copy is then the new one."""

        def called(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if type(layer) is nn.Linear:  # else the text has been here before
                quantised = self.quantise(path, layer, args[0])
                return torch.cat([output.chunk(2)[0], quantised(args[0].chunk(2)[1]).to(output.dtype)])

        return called

    def quantise(self, path: str, layer: nn.Linear, inputs: Tensor) -> QuantizedLinear:
        home = layer.weight.device
        device = self.device or home
        with torch.autocast(device.type, enabled=False):
            original, seen = _copies(inputs, device)
            weight = layer.weight.detach().to(device).float()
            wanted = original @ weight.t()
            if path.endswith(ENDS_OF_BLOCKS):  # here the block can make good what is wrong in the stream before it
                wanted += torch.sub(*_copies(self.stream, device))
            tensors = self.rounding(refit(weight, seen, wanted), seen.t() @ seen)
        return use(self.lm, path, self.format, {name: t.to(home) for name, t in tensors.items()}, self.block)


def _copies(x: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Both copies of the text, (tokens, width) fp32 each."""
    first, second = x.detach().to(device).float().chunk(2)
    return first.flatten(0, -2), second.flatten(0, -2)
