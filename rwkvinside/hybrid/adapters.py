"""Low-rank adapters on linear layers, through PEFT, and on experts, as PEFT's `target_parameters`.

Only this file imports PEFT, and only when it is needed. Experts have LoRA only; it is `experts.py` that computes it,
which PEFT cannot on quantized weights, and the files that are written are PEFT's.

LoRA (also rank-stabilized, weight-decomposed, or started from principal components) and MiSS. "Bone" is the name under
which MiSS was first published; its successor in PEFT is MiSS with `init_weights="bat"`. Bone checkpoints of older
versions cannot be loaded: their blocks run over inputs, those of MiSS over outputs.

Two adapters may sit on a layer: `default` trains; `start` exists for PiSSA only, is frozen and subtracts what `default`
began with. So the layer's own weight stays the teacher's, and a layer with its adapters off is the teacher's layer.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..support.files import replacing
from .experts import ExpertWeight, expert_weight, is_expert_weight, split_name
from .quantized_linear import replace
from .settings import AdapterConfig

NAME, START = "default", "start"
PISSA = "pissa_niter_16"  # randomized SVD; the exact one takes minutes for a large matrix
FILES = ("adapter_config.json", "adapter_model.safetensors")
_TENSOR = re.compile(r"\.(lora_[AB]|lora_magnitude_vector|miss_block)\.(default|start)(\.weight)?$")


def is_adapter(name: str) -> bool:
    """Return whether a parameter's name is that of an adapter's tensor."""
    return _TENSOR.search(name) is not None


def is_start(name: str) -> bool:
    """Return whether a parameter belongs to the frozen start of PiSSA."""
    return is_adapter(name) and f".{START}" in name


def learns_at_once(name: str) -> bool:
    """Return whether a tensor of an adapter has a gradient in the first step; A has none while B is zero."""
    return is_adapter(name) and ".lora_A." not in name


def module_of(name: str) -> str:
    """Return the name of the linear layer that an adapter's tensor sits on."""
    return _TENSOR.sub("", name)


def inject(model: nn.Module, spec: AdapterConfig, names: Sequence[str]) -> None:
    """Put adapters around linear layers, in place.

    At first they have no effect. Their tensors are fp32 and trainable, nothing else is.

    Args:
        model: module with the layers; on the meta device adapters are made there too.
        spec: what the adapters are like.
        names: of linear layers below the model, quantized or not, none of which has an adapter.

    Raises:
        UserError: a layer that the kind of adapter does not fit.
    """
    experts = [name for name in names if is_expert_weight(name)]
    _check_experts(spec, experts)
    stacks = [expert_weight(model, name) for name in experts]
    names = [name for name in names if name not in experts]
    _check(model, spec, [*names, *experts])
    device = next(model.parameters()).device
    with torch.device(device):
        for stack in stacks:
            stack.add_lora(NAME, spec.rank, _scaling(spec))
        if not names:
            return
        _inject(model, spec, names, NAME)
        layers = [model.get_submodule(name) for name in names]
        if spec.init == "pissa":
            _inject(model, spec, names, START)
            for layer in layers:
                _start_from_principal_components(layer)
    for layer in layers:
        if spec.dropout:
            dropouts = layer.lora_dropout if spec.kind == "lora" else layer.miss_dropout
            dropouts[NAME] = _TrainingDropout(spec.dropout)
        for name, parameter in layer.named_parameters():
            if is_adapter(f".{name}"):
                parameter.data = parameter.data.float()


@contextmanager
def disabled(model: nn.Module, but: str | None = None) -> Iterator[None]:
    """Return a context in which layers work without their adapters.

    Args:
        model: module with the layers.
        but: layers with this in their name keep their adapters.
    """
    layers = [layer for name, layer in adapted(model).items() if but is None or but not in name]
    states = [layer._disable_adapters for layer in layers]  # the public switch also freezes parameters
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, value in zip(layers, states, strict=True):
            layer._disable_adapters = value


def adapted(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that have an adapter, by name, and all experts whose weights are modules."""
    return {name: m for name, m in model.named_modules() if hasattr(m, "base_layer") and hasattr(m, "merge")}


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Replace every adapted layer by a plain one with the same effect.

    The layers below the adapters must be plain ones.
    """
    for name, layer in adapted(model).items():
        layer.merge()
        if not isinstance(layer, ExpertWeight):
            replace(model, name, layer.base_layer)


def remove(model: nn.Module) -> None:
    """Take the adapters off: the layers are again what they were."""
    for name, layer in adapted(model).items():
        if isinstance(layer, ExpertWeight):
            layer.remove_lora()
        else:
            replace(model, name, layer.base_layer)


def peft_files(spec: AdapterConfig, tensors: Mapping[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """Return an adapter as PEFT stores it.

    PiSSA becomes the plain LoRA of twice the rank that has the same effect on the unchanged weights.

    Args:
        spec: what the adapter is like.
        tensors: of this adapter, by the names of the exported model.

    Returns:
        Contents of adapter_config.json, and of adapter_model.safetensors by name.
    """
    config = _config(spec, sorted({module_of(name) for name in tensors})).to_dict()
    config = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    config |= {"inference_mode": True}
    if spec.init == "pissa":
        tensors = _as_plain_lora(tensors)
        scale = 2**0.5 if spec.rank_stabilized else 2
        config |= {"init_lora_weights": True, "r": 2 * spec.rank, "lora_alpha": scale * config["lora_alpha"]}
    stored = {f"base_model.model.{_peft_name(name, tensors)}": t.contiguous() for name, t in tensors.items()}
    return config, stored


def _peft_name(name: str, names: Iterable[str]) -> str:
    """Return PEFT's name of a tensor: one wrapper for each weight of experts, a later one around those before it."""
    layer = module_of(name)
    plain = name.replace(f".{NAME}", "")
    if not is_expert_weight(layer):
        return plain
    experts, _ = split_name(layer)
    beside = list(dict.fromkeys(other for other in map(module_of, names) if split_name(other)[0] == experts))
    around = len(beside) - 1 - beside.index(layer)
    return experts + ".base_layer" * around + plain.removeprefix(layer)


def adapter_directory(index: int) -> str:
    """Return the name of the directory for an entry of `adapters`."""
    return f"adapter-{index + 1}" if index else "adapter"


def write_peft(directory: Path, spec: AdapterConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write a directory for `PeftModel.from_pretrained`, complete or not at all.

    Raises:
        UserError: the directory cannot be written, for lack of space for example.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    config, stored = peft_files(spec, tensors)
    try:
        with replacing(directory) as temporary:
            temporary.mkdir()
            (temporary / FILES[0]).write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")
            save_file({name: t.detach().cpu().contiguous() for name, t in stored.items()}, temporary / FILES[1])
            (temporary / FILES[1]).chmod((temporary / FILES[0]).stat().st_mode)
            shutil.rmtree(directory, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {directory}: {error}", "free space, then run the same command again") from error


class _TrainingDropout(nn.Dropout):
    """Dropout that is active where gradients are computed.

    The model itself is always in evaluation mode, and a recomputation in the backward must drop the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, training=torch.is_grad_enabled())


def _config(spec: AdapterConfig, names: Sequence[str]):
    from peft import LoraConfig, MissConfig

    if spec.kind == "lora":
        return LoraConfig(
            r=spec.rank,
            lora_alpha=2 * spec.rank if spec.alpha is None else spec.alpha,
            lora_dropout=spec.dropout,
            use_rslora=spec.rank_stabilized,
            use_dora=spec.dora,
            target_modules=[name for name in names if not is_expert_weight(name)],
            target_parameters=[name for name in names if is_expert_weight(name)] or None,
        )
    init = "bat" if spec.kind == "bone" else True
    return MissConfig(r=spec.rank, miss_dropout=spec.dropout, init_weights=init, target_modules=list(names))


def _inject(model: nn.Module, spec: AdapterConfig, names: Sequence[str], name: str) -> None:
    from peft import inject_adapter_in_model

    # PEFT keeps a configuration on what it is given, and would read a leftover as the next entry's; and it takes the
    # dense layers of a model with experts for experts where it sees the model's configuration
    holder = nn.Module()
    holder.model = model
    inject_adapter_in_model(_config(spec, names), holder, adapter_name=name)


def _scaling(spec: AdapterConfig) -> float:
    """Return what the product of both factors of LoRA is multiplied with."""
    alpha = 2 * spec.rank if spec.alpha is None else spec.alpha
    return alpha / (spec.rank**0.5 if spec.rank_stabilized else spec.rank)


def _check_experts(spec: AdapterConfig, names: Sequence[str]) -> None:
    """Refuse what PEFT does not have for parameters of three dimensions."""
    if not names:
        return
    others = {
        spec.kind: spec.kind != "lora",
        "dora": spec.dora,
        "dropout": spec.dropout,
        "init pissa": spec.init == "pissa",
    }
    if chosen := [name for name, applies in others.items() if applies]:
        raise UserError(
            f"adapters: {chosen[0]} does not fit {names[0]}, the weights of all experts of a layer",
            "use kind: lora without dora, dropout and pissa, or name groups or expressions without experts",
        )


def _check(model: nn.Module, spec: AdapterConfig, names: Iterable[str]) -> None:
    lora = spec.kind == "lora"
    for field in ("rank_stabilized", "dora"):
        if getattr(spec, field) and not lora:
            raise UserError(f"adapters: {field} is a form of lora, not of {spec.kind}", "use kind: lora")
    if spec.init == "pissa" and (not lora or spec.dora or spec.dropout):
        raise UserError(
            f"adapters: init pissa does not go with {'dora or dropout' if lora else spec.kind}",
            "use kind: lora without dora and dropout, or init: default",
        )
    if spec.alpha is not None and not lora:
        raise UserError(f"adapters: {spec.kind} has no alpha", "leave it out")
    for name in names:
        linear = model.get_submodule(name)
        sizes = (linear.in_features, linear.out_features)
        if spec.kind == "bone" and any(size % spec.rank for size in sizes):
            raise UserError(
                f"adapters: bone of block size {spec.rank} does not divide {name} ({sizes[0]} to {sizes[1]})",
                "choose a rank that divides both, or kind: miss",
            )
        if spec.rank > min(sizes):
            raise UserError(f"adapters: rank {spec.rank} is more than {name} has ({min(sizes)})", "choose a lower rank")


@torch.no_grad()
def _start_from_principal_components(layer: nn.Module) -> None:
    """Initialize PiSSA (arXiv 2404.02948) by PEFT, on a copy of the weight."""
    layer.set_adapter([NAME, START])
    layer.scaling[START] = -layer.scaling[NAME]
    if layer.lora_A[NAME].weight.is_meta:
        return
    base = layer.base_layer
    copy = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    copy.weight = nn.Parameter(base.weight.detach().float().clone(), requires_grad=False)
    layer.base_layer = copy
    layer.pissa_init(NAME, PISSA)
    layer.base_layer = base
    for matrices in (layer.lora_A, layer.lora_B):
        matrices[START].weight.data = matrices[NAME].weight.data.clone()


def _as_plain_lora(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    plain = {}
    for name, tensor in tensors.items():
        if f".{NAME}" in name:
            start = tensors[name.replace(f".{NAME}", f".{START}")]
            plain[name] = torch.cat([tensor, start], 0) if ".lora_A." in name else torch.cat([tensor, -start], 1)
    return plain
