"""Experts whose weights are quantized, or have low-rank adapters.

transformers keeps the weights of a layer's experts as parameters of three dimensions, which neither quantized layers
nor PEFT's adapters of linear layers fit. Here such a weight becomes a module: what is packed is unpacked, and what is
adapted is added up, whenever the experts run, in the forward and again in the backward; the family's own code then
computes with the result. So nothing is kept but what is packed. Experts of which nothing is quantized or adapted stay
as transformers made them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from .quantized_linear import QuantizedLinear

_NAME = re.compile(r"(.*\.experts)\.(\w+)$")


class ExpertWeight(nn.Module):
    """The weights of all experts of one layer, (experts, out, in).

    Args:
        weight: 3-D.

    Attributes:
        base_layer: the weight itself, or the linear layer of (experts * out, in) that it was quantized as.
        lora_A, lora_B: of an adapter, linear layers to rank * experts and from it, laid out as PEFT's.
        scaling: of the adapter's product; 0: there is none.
        shape: of the weight.
    """

    base_layer: nn.Parameter | nn.Linear

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.base_layer = weight
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.scaling = 0.0
        self.shape = weight.shape
        self._disable_adapters = False

    @property
    def in_features(self) -> int:
        """Inputs of an expert."""
        return self.shape[2]

    @property
    def out_features(self) -> int:
        """Outputs of an expert."""
        return self.shape[1]

    @property
    def requires_grad(self) -> bool:
        """Whether the weight itself trains."""
        return isinstance(self.base_layer, nn.Parameter) and self.base_layer.requires_grad

    @property
    def made_numel(self) -> int:
        """Numbers that exist only while the experts run: unpacked, with an adapter, and that sum's gradient."""
        return self.numel() * (isinstance(self.base_layer, QuantizedLinear) + 2 * bool(self.scaling))

    def numel(self) -> int:
        """Return the number of weights."""
        return self.shape.numel()

    def flatten(self) -> None:
        """Make the weight that of a plain linear layer, which can be quantized."""
        if isinstance(self.base_layer, nn.Parameter):
            weight, (count, rows, columns) = self.base_layer, self.shape
            linear = nn.Linear(columns, count * rows, bias=False, device="meta")
            linear.weight = nn.Parameter(weight.detach().view(count * rows, columns), requires_grad=False)
            del self.base_layer
            self.base_layer = linear

    def stack(self) -> None:
        """Make a plain linear layer the 3-D weight again."""
        if isinstance(self.base_layer, nn.Linear):
            self.base_layer = nn.Parameter(self.base_layer.weight.detach().view(self.shape), requires_grad=False)

    def add_lora(self, name: str, rank: int, scaling: float) -> None:
        """Put an adapter on, which has no effect at first.

        Args:
            name: of the adapter.
            rank: of each expert's product.
            scaling: of the products.
        """
        count, rows, columns = self.shape
        self.lora_A[name] = nn.Linear(columns, rank * count, bias=False)
        self.lora_B[name] = nn.Linear(rank * count, rows, bias=False)
        nn.init.zeros_(self.lora_B[name].weight)
        self.scaling = scaling

    def remove_lora(self) -> None:
        """Take the adapter off."""
        self.lora_A, self.lora_B, self.scaling = nn.ModuleDict(), nn.ModuleDict(), 0.0

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adapter to the weight, which must not be quantized, and take it off."""
        self.stack()
        if self.scaling:
            self._disable_adapters = False
            self.base_layer = nn.Parameter(self(torch.float32), requires_grad=False)
            self.remove_lora()

    def forward(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (experts, out, in) that experts compute with, unpacked in `dtype`, else in its own."""
        base = self.base_layer
        if isinstance(base, QuantizedLinear):
            weight = base.unpack(dtype).view(self.shape)
        else:
            weight = base if isinstance(base, nn.Parameter) else base.weight.view(self.shape)
        if not self.scaling or self._disable_adapters:
            return weight
        (a,), (b,) = ([cast(nn.Linear, layer).weight for layer in d.values()] for d in (self.lora_A, self.lora_B))
        # PEFT's layout (target_parameters): experts outside in A, inside in B
        a = a.unflatten(0, (self.shape[0], -1)).to(weight.dtype)
        b = b.unflatten(1, (-1, self.shape[0])).permute(2, 0, 1).to(weight.dtype)
        with torch.autocast(weight.device.type, enabled=False):
            return torch.baddbmm(weight, b, a, alpha=self.scaling)


class StackedExperts(nn.Module):
    """A family's experts with their weights as `ExpertWeight` modules, under the names that they had.

    Args:
        experts: the family's module, which loses its weights.

    Attributes:
        recomputed: the layer's activations are made again in the backward, the weights among them. They are no matter
            of this module then: hooks of its own would hide all that the experts keep from the checkpoint around it.
    """

    _z3_leaf = True  # read by DeepSpeed: weights are whole in the backward, too

    def __init__(self, experts: nn.Module):
        super().__init__()
        for name in weights_of(experts):
            setattr(self, name, ExpertWeight(cast(nn.Parameter, experts._parameters.pop(name))))
        self.module = experts
        self.recomputed = False

    @property
    def weights(self) -> dict[str, ExpertWeight]:
        """The weights by name."""
        return {name: child for name, child in self.named_children() if isinstance(child, ExpertWeight)}

    def forward(self, hidden_states: Tensor, *args: Any) -> Tensor:
        """Return what the family's experts return."""
        device = hidden_states.device.type
        # transformers casts inputs to the type of the weights
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
        made = {name: weight(dtype) for name, weight in self.weights.items()}
        again = _MadeAgain(self.weights, made, dtype)
        with nullcontext() if self.recomputed else saved_tensors_hooks(again.pack, again.unpack):
            return functional_call(self.module, made, (hidden_states, *args))


class _MadeAgain:
    """Keeps weights out of a graph: the backward makes them again, once for all that needs them."""

    def __init__(self, weights: dict[str, ExpertWeight], made: dict[str, Tensor], dtype: torch.dtype):
        self._weights, self._dtype = weights, dtype
        temporary = {name: tensor for name, tensor in made.items() if not isinstance(tensor, nn.Parameter)}
        self._names = {tensor.untyped_storage().data_ptr(): name for name, tensor in temporary.items()}
        self._uses: Counter[str] = Counter()
        self._made: dict[str, Tensor] = {}

    def pack(self, tensor: Tensor) -> Any:
        """Return a tensor, or of a weight which part of it it is."""
        name = self._names.get(tensor.untyped_storage().data_ptr())
        if name is None:
            return tensor
        self._uses[name] += 1
        return name, tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(self, kept: Any) -> Tensor:
        """Return what was packed."""
        if isinstance(kept, Tensor):
            return kept
        name, *view = kept
        if name not in self._made:
            with torch.no_grad():
                self._made[name] = self._weights[name](self._dtype)
        weight = self._made[name]
        self._uses[name] -= 1
        if self._uses[name] <= 0:
            del self._made[name]
        return weight.as_strided(*view)


def weights_of(experts: nn.Module) -> list[str]:
    """Return the names of the weights of a family's experts."""
    return [name for name, p in experts.named_parameters(recurse=False) if p.ndim == 3]


def is_expert_weight(name: str) -> bool:
    """Return whether a parameter or module is the weights of a layer's experts, by its name."""
    return _NAME.match(name) is not None


def split_name(name: str) -> tuple[str, str]:
    """Return the names of the experts and of the weight in them."""
    experts, _, weight = name.rpartition(".")
    return experts, weight


def expert_weights(model: nn.Module) -> list[str]:
    """Return the names of all weights of experts, whether they are parameters or `ExpertWeight` modules."""
    names = []
    for path, module in model.named_modules():
        if isinstance(module, StackedExperts):
            names += [f"{path}.{name}" for name in module.weights]
        elif path.endswith(".experts"):
            names += [f"{path}.{name}" for name in weights_of(module)]
    return names


def expert_weight(model: nn.Module, name: str) -> ExpertWeight:
    """Return one of `expert_weights` as a module, which it becomes if need be."""
    path, _ = split_name(name)
    experts = model.get_submodule(path)
    if not isinstance(experts, StackedExperts):
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, StackedExperts(experts))
    return cast(ExpertWeight, model.get_submodule(name))


def flatten_experts(model: nn.Module, names: Collection[str]) -> dict[str, str]:
    """Make some of `expert_weights` linear layers, and return their names as such."""
    for name in names:
        expert_weight(model, name).flatten()
    return {name: f"{name}.base_layer" for name in names}


def stack_experts(model: nn.Module) -> None:
    """Make all weights of experts that are not quantized 3-D again."""
    for module in model.modules():
        if isinstance(module, ExpertWeight) and not isinstance(module.base_layer, QuantizedLinear):
            module.stack()
