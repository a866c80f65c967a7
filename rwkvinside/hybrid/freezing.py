"""Groups of a student's parameters, and their names in the exported model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from ..families.base import Family
from .adapters import is_adapter
from .experts import is_expert_weight

PROJECTIONS = ("receptance", "key", "value", "output", "r_norm", "k_norm")

GROUPS = {
    "mixer": "every parameter of the RWKV mixers",
    "mixer.proj": "receptance, key, value, output and their norms: what was copied from the teacher",
    "mixer.lora": "decay, in-context rate, gate, residual mixes, bonus: what the teacher does not have",
    "attention": "the attention of layers that keep it",
    "mlp": "feed-forward layers",
    "norms": "norms of the residual stream",
    "embed": "input embedding",
    "head": "output head",
    "adapters": "every adapter, wherever it sits",
}

TEACHER = "teacher"  # the group of the frozen attention next to the mixers, which can be quantized and nothing else


def walk(model: nn.Module, without: str | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Yield a module and all below it with their paths, in the order of `named_modules` at half its time.

    Plans of deep teachers look through them a hundred times.

    Args:
        without: name of modules that are left out with what is below them.
    """
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop()
        yield path, module
        above = f"{path}." if path else ""
        for name, child in reversed(module._modules.items()):
            if child is not None and name != without:
                waiting.append((above + name, child))


def canonical_name(name: str) -> str:
    """Return the name in the exported model of a student's parameter or module."""
    return name.removeprefix("lm.").replace(".student_attn", "").replace(".base_layer", "")


def weight_name(layer: str) -> str:
    """Return the name of a linear layer's weight; experts are called as their weight."""
    return layer if is_expert_weight(layer) else f"{layer}.weight"


def weight_names(layers: Iterable[str]) -> set[str]:
    """Return the names of linear layers' weights, without the teacher's attention."""
    return {weight_name(name) for name in layers if ".teacher_attn." not in name}


def group_of(name: str, family: Family, rwkv_layers: list[int]) -> tuple[str, ...]:
    """Return the groups of a canonical parameter name, from wide to narrow."""
    if is_adapter(name):
        return ("adapters",)
    if ".teacher_attn." in name:
        return (TEACHER,)
    groups = family.group_of(name)
    if groups[0] != "attention" or family.layer_of(name) not in rwkv_layers:
        return groups
    return ("mixer", "mixer.proj" if family.attention_part(name) in PROJECTIONS else "mixer.lora")
