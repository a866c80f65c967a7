"""A stage's student from its parts, with quantized layers and adapters.

A student is always assembled in the same order: teacher, mixers, weights of the stage before, quantization, adapters,
weights of the adapters. So a stage in one go, a resumed one and an export come to the same model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data.batch import Batch
from ..errors import UserError
from ..support.text import rounded_bytes, rounded_count
from .adapters import adapted, inject, is_adapter, is_start, merge, module_of, remove
from .experts import ExpertWeight, flatten_experts, is_expert_weight, stack_experts
from .freezing import GROUPS, TEACHER, weight_name
from .gptq import quantize_by_inputs
from .model import HybridModel
from .quantized_linear import (
    QuantizedLinear,
    dequantized,
    flat_tensors,
    quantize,
    read_flat,
    relative_error,
    replace,
    restore,
)
from .settings import AdapterConfig, LayerSpec, QuantizeConfig, StudentConfig

PackedLayer = tuple[str, dict[str, Tensor], int]  # format, tensors and block of a quantized layer

WARNING = (
    "adapters on the mixers' own projections: RADLADS (arXiv 2505.03005) found LoRA there detrimental; "
    "mixers are best trained in full"
)


def assemble(
    lm: PreTrainedModel,
    spec: StudentConfig,
    layer_spec: LayerSpec,
    tensors: Mapping[str, Tensor] | None = None,
    frozen_weights: Mapping[str, Tensor] | None = None,
    device: torch.device | None = None,
    text: Callable[[], Batch] | None = None,
    earlier: Mapping[str, Tensor] | None = None,
) -> HybridModel:
    """Return the student of a stage, in evaluation mode.

    Args:
        lm: the teacher, which afterwards belongs to the student.
        spec: what the student is.
        layer_spec: the stage's quantized layers and adapters.
        tensors: `student_state_dict` of the stage before, or of a checkpoint; None at the start of a conversion.
        frozen_weights: `frozen_weights_of` of the stage if it has begun before; None: quantize now.
        device: where to quantize; the student itself stays where `lm` is.
        text: makes a text of a few thousand tokens, on the model's device, where the method is gptq.
        earlier: `frozen_weights_of` of the stage before: layers that both quantize alike keep their bits.

    Raises:
        UserError: tensors that do not fit, names that match nothing, a layer that cannot be quantized or adapted.
    """
    model = HybridModel.from_teacher(lm, spec).eval()
    if tensors is not None:
        model.load_student_state_dict({n: t for n, t in tensors.items() if not is_adapter(n)})
    apply(model, layer_spec, frozen_weights, device, text, earlier)
    if tensors is not None:
        _load_adapters(model, {n: t for n, t in tensors.items() if is_adapter(n)})
    return model.eval()


def apply(
    model: HybridModel,
    layer_spec: LayerSpec,
    frozen_weights: Mapping[str, Tensor] | None = None,
    device: torch.device | None = None,
    text: Callable[[], Batch] | None = None,
    earlier: Mapping[str, Tensor] | None = None,
) -> None:
    """Quantize layers and put adapters on.

    On the meta device they may replace those of an earlier `layer_spec`, to plan a run.

    Args, raises: see `assemble`.
    """
    if model.quantized or adapter_names(model):
        _undo(model)
    layers, config = model.linear_layers(), layer_spec.quantize
    names = _chosen(model, layers, config.groups, "quantize")
    stored = _stored_layers(names, config, frozen_weights, earlier)
    parameters = model.canonical_parameters()
    trained = (weight for weight in map(weight_name, names) if weight in model.trained)
    model.master_weights = {weight: parameters[weight].detach() for weight in trained}
    del parameters
    experts = [name for name in names if is_expert_weight(name)]
    if experts and config.fits_inputs:
        raise UserError(
            f"quantize.method gptq does not fit {experts[0]}: each expert sees few of its text's tokens",
            "use method: nearest, or name groups or expressions without experts",
        )
    layers |= flatten_experts(model.lm, experts)
    for name, packed in stored.items():
        restore(model.lm, layers[name], *packed)
    new = [name for name in names if name not in stored]
    if new and config.fits_inputs and not _is_meta(model):
        if text is None:
            raise RuntimeError("gptq needs a text")
        quantize_by_inputs(model, new, text(), config, device)
    quantized = model.quantized
    rest = [layers[name] for name in new if name not in quantized]  # with gptq what the text did not reach
    quantize(model.lm, rest, config.format, config.double, config.block, device)
    if set(model.quantized) != set(names):
        raise RuntimeError(f"quantized {sorted(model.quantized)}, asked for {names}")
    _add_adapters(model, layer_spec.adapters, frozen_weights or {})
    model.refresh_head()
    model.requires_grad_(False)


def frozen_weights_of(model: HybridModel) -> dict[str, Tensor]:
    """Return what a stage computes once from the weights it starts with.

    It never changes: quantized weights and the starts of PiSSA; none if the stage has neither.
    """
    starts = {n: p.detach() for n, p in model.canonical_parameters().items() if is_start(n)}
    return flat_tensors(model.quantized) | starts


def adapter_names(model: HybridModel) -> list[str]:
    """Return the canonical names of all tensors of adapters."""
    return [name for name in model.canonical_parameters() if is_adapter(name)]


def adapters_of(
    model: HybridModel, layer_spec: LayerSpec, tensors: Mapping[str, Tensor] | None = None
) -> list[tuple[AdapterConfig, dict[str, Tensor]]]:
    """Return each entry of `adapters` with its tensors by canonical name.

    Args:
        model: with the layers.
        layer_spec: with the entries.
        tensors: to choose from; None: the model's own.
    """
    if tensors is None:
        tensors = {name: p.detach() for name, p in model.canonical_parameters().items()}
    layers = model.linear_layers()
    entries = []
    for spec in layer_spec.adapters:
        names = set(_chosen(model, layers, spec.groups, "adapters"))
        entries.append((spec, {n: t for n, t in tensors.items() if is_adapter(n) and module_of(n) in names}))
    return entries


def take_adapters(model: HybridModel, layer_spec: LayerSpec) -> list[tuple[AdapterConfig, dict[str, Tensor]]]:
    """Take the adapters off and return them, see `adapters_of`."""
    entries = adapters_of(model, layer_spec)
    remove(model.lm)
    model.refresh_head()
    return entries


def make_plain(model: HybridModel, keep_adapters: bool = False) -> None:
    """Unpack quantized weights to fp32 and merge adapters, in place.

    The model computes as before, on plain layers.

    Args:
        model: changed in place.
        keep_adapters: unpack only; adapters stay around the plain layers.
    """
    for path, layer in adapted(model.lm).items():
        if isinstance(layer.base_layer, QuantizedLinear):
            layer.base_layer = dequantized(layer.base_layer)
            if isinstance(layer, ExpertWeight):
                layer.stack()
        if path == model.family.head_path:
            model.untie()
    if not keep_adapters:
        merge(model.lm)
    for path, layer in list(model.lm.named_modules()):
        if isinstance(layer, QuantizedLinear):
            replace(model.lm, path, dequantized(layer))
    stack_experts(model.lm)
    model.master_weights.clear()
    model.refresh_head()


def quantized_teacher(model: HybridModel) -> bool:
    """Return whether mode "teacher" runs on quantized weights, so not as the original."""
    return any(model.group_of(f"{name}.weight")[0] != "mixer" for name in model.quantized)


def layer_lines(model: HybridModel, layer_spec: LayerSpec) -> list[str]:
    """Return lines for plans and the console: which layers are quantized and adapted."""
    lines = []
    if quantized := model.quantized:
        config = layer_spec.quantize
        weights = sum(layer.weight_numel for layer in quantized.values())
        size = sum(layer.nbytes for layer in quantized.values())
        scales = "" if config.format == "int8" else f" in blocks of {config.block}"
        scales += ", scales quantized too" if config.double and scales else ""
        error = relative_error(quantized.values())
        if config.fits_inputs:
            scales += ", fitted to their inputs"
        lines.append(
            f"quantized {len(quantized)} linear layers in {config.format}{scales}: "
            f"{rounded_count(weights)} weights in {rounded_bytes(size)}"
            + (f", changed by {100 * error:.2g} %" if error else "")
        )
        lines += [f"          {line}" for line in _summary(quantized)]
        if quantized_teacher(model):
            lines.append("          the student's own weights as teacher are quantized too: not exactly the original")
    for spec, tensors in adapters_of(model, layer_spec):
        names = sorted({module_of(name) for name in tensors})
        count = sum(t.numel() for name, t in tensors.items() if not is_start(name))
        scale = f", alpha {2 * spec.rank if spec.alpha is None else spec.alpha:g}" if spec.kind == "lora" else ""
        lines.append(
            f"adapters  {spec.title}: rank {spec.rank}{scale}, {rounded_count(count)} parameters on {len(names)} layers"
        )
        lines += [f"          {line}" for line in _summary(names)]
        if any(model.group_of(f"{name}.weight")[0] == "mixer" for name in names):
            lines.append(f"          WARNING: {WARNING}")
    return lines


def _stored_layers(
    names: Collection[str],
    config: QuantizeConfig,
    frozen_weights: Mapping[str, Tensor] | None,
    earlier: Mapping[str, Tensor] | None,
) -> dict[str, PackedLayer]:
    """Return the layers to quantize whose tensors are known, by name.

    Raises:
        UserError: the stage began with other layers.
    """
    if frozen_weights is None:
        form = (config.format, config.double and config.format != "int8", config.block)
        return {
            name: (format, tensors, block)
            for name, (format, tensors, block) in _packed(earlier).items()
            if name in names and (format, "outer" in tensors, block) == form
        }
    stored = _packed(frozen_weights)
    if set(stored) != set(names):
        first = min(set(stored) ^ set(names))
        raise UserError(
            f"this stage began with other quantized layers: {first} is {'' if first in stored else 'not '}among them",
            "resume with the settings under `quantize` that it began with",
        )
    return stored


def _packed(frozen_weights: Mapping[str, Tensor] | None) -> dict[str, PackedLayer]:
    """Return the quantized layers among `frozen_weights_of`, see `read_flat`."""
    return read_flat({key: t for key, t in (frozen_weights or {}).items() if "/" in key})


def _chosen(model: HybridModel, layers: Collection[str], patterns: Sequence[str], field: str) -> list[str]:
    """Return the linear layers that patterns name, in the model's order.

    Patterns are groups or regular expressions.
    """
    chosen: set[str] = set()
    groups = {name: model.group_of(f"{name}.weight") for name in layers}
    if field == "adapters":
        groups = {name: group for name, group in groups.items() if group != (TEACHER,)}
    for pattern in patterns:
        if pattern in GROUPS or pattern == TEACHER:
            names = {name for name, group in groups.items() if pattern in group}
        else:
            try:
                names = {name for name in groups if re.fullmatch(pattern, name)}
            except re.error as error:
                raise UserError(f"{field}: {pattern!r} is not a regular expression: {error}") from error
        if not names:
            usable = dict.fromkeys(part for group in groups.values() for part in group)
            raise UserError(
                f"{field}: {pattern!r} names no linear layer",
                f"groups: {', '.join(usable)}; or a regular expression over names like {next(iter(groups))}",
            )
        chosen |= names
    return [name for name in groups if name in chosen]


def _add_adapters(model: HybridModel, specs: Iterable[AdapterConfig], frozen_weights: Mapping[str, Tensor]) -> None:
    layers = model.linear_layers()
    adapted_names: set[str] = set()
    for spec in specs:
        names = _chosen(model, layers, spec.groups, "adapters")
        if repeated := [name for name in names if name in adapted_names]:
            raise UserError(f"adapters: two entries name {repeated[0]}", "give a layer one adapter only")
        adapted_names |= set(names)
        inject(model.lm, spec, [layers[name] for name in names])
    if adapted_names and frozen_weights:
        parameters = model.canonical_parameters()
        for name in (name for name in parameters if is_start(name)):
            for tensor in (name, name.replace(".start", ".default")):  # PiSSA begins with what is subtracted
                parameters[tensor].data = frozen_weights[name].clone()


@torch.no_grad()
def _load_adapters(model: HybridModel, tensors: Mapping[str, Tensor]) -> None:
    if not tensors:
        return
    parameters = model.canonical_parameters()
    shapes = {name: tuple(parameters[name].shape) for name in adapter_names(model)}
    stored = {name: tuple(t.shape) for name, t in tensors.items()}
    if shapes != stored:
        first = min(name for name in shapes | stored if shapes.get(name) != stored.get(name))
        raise UserError(
            f"the adapters of the checkpoint do not fit: {first} is {stored.get(first, 'missing')} there and "
            f"{shapes.get(first, 'missing')} here",
            "use the settings under `adapters` that the checkpoint was made with",
        )
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)
    model.trained |= set(tensors)


def _is_meta(model: HybridModel) -> bool:
    return model.family.embedding(model.lm).weight.is_meta


def _undo(model: HybridModel) -> None:
    """Return to plain layers; only on the meta device, as their weights are gone."""
    if not _is_meta(model):
        raise RuntimeError("a student with weights gets its layer_spec once")
    remove(model.lm)
    for path, layer in list(model.lm.named_modules()):
        if isinstance(layer, QuantizedLinear):
            replace(model.lm, path, dequantized(layer))
    stack_experts(model.lm)
    model.master_weights.clear()


def _summary(names: Iterable[str]) -> list[str]:
    """Return names with layer numbers drawn together: model.layers.{0-27}.mlp.up_proj."""
    numbers: dict[str, list[int]] = {}
    for name in names:
        match = re.match(r"(.*?\.)(\d+)(\..*)", name)
        if match is None:
            numbers[name] = []
        else:
            numbers.setdefault(f"{match[1]}{{}}{match[3]}", []).append(int(match[2]))
    return [pattern.format(_ranges(layers)) for pattern, layers in numbers.items()]


def _ranges(numbers: list[int]) -> str:
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    text = ",".join("-".join(map(str, ends)) for ends in ranges)
    return f"{{{text}}}" if numbers[1:] else text
