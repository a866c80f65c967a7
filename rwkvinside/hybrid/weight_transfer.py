"""The transfer of a teacher's attention into a mixer and back, by the table of its family."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..families.base import Source
from ..modeling.time_mixer import TimeMixer

NORMED = {"receptance.weight": "r_norm.weight", "key.weight": "k_norm.weight"}  # projection -> the norm that follows


@torch.no_grad()
def transfer(attention: nn.Module, mixer: TimeMixer, sources: Mapping[str, Source]) -> None:
    """Copy the teacher's projections and norms into the mixer.

    Bit for bit, but where a `Source` adds or multiplies, and where the mixer's preset has no biases or norms of queries
    and keys: biases are left out, and the weights of the norms multiply the rows of the projections.

    Args:
        attention: the teacher's.
        mixer: changed in place.
        sources: the family's, by tensor of the mixer.

    Raises:
        ValueError: a teacher tensor that the mixer does not have, or a shape that does not fit.
    """
    targets, tensors = dict(mixer.named_parameters()), dict(attention.named_parameters())
    used = {source.name for target, source in sources.items() if target in targets or _may_lack(mixer, target)}
    if unused := [name for name in tensors if name not in used]:
        raise ValueError(f"the teacher's attention has {unused[0]}, which this mixer preset does not have")
    for name, target in targets.items():
        source = sources.get(name)
        if source is None or source.name not in tensors:  # the mixer's own
            continue
        value = tensors[source.name].to(target.dtype)
        value = value if source.rows is None else value[source.rows.to(value.device)]
        if target.shape != value.shape:
            raise ValueError(f"{source.name} has shape {tuple(value.shape)}, the mixer needs {tuple(target.shape)}")
        target.copy_((value + source.plus) * source.factor * _folded_norm(name, mixer, sources, tensors))


@torch.no_grad()
def teacher_tensor(name: str, mixer: TimeMixer, sources: Mapping[str, Source], attention: nn.Module) -> Tensor | None:
    """Return a tensor of the teacher's attention from its copies in the mixer: `transfer` backwards.

    Args:
        name: in the attention.
        mixer: which has not trained yet.
        sources: the family's.
        attention: the teacher's, for the norms that the mixer may be without.

    Returns:
        In the mixer's dtype; None: the mixer has no copy of it.
    """
    targets, tensors = dict(mixer.named_parameters()), dict(attention.named_parameters())
    parts = {target: source for target, source in sources.items() if source.name == name and target in targets}
    if not parts:
        return None
    values = torch.cat(
        [
            targets[target] / _folded_norm(target, mixer, sources, tensors) / source.factor - source.plus
            for target, source in parts.items()
        ]
    )
    rows = [source.rows for source in parts.values() if source.rows is not None]
    return values if not rows else torch.empty_like(values).index_copy_(0, torch.cat(rows).to(values.device), values)


def _may_lack(mixer: TimeMixer, target: str) -> bool:
    """Return whether the mixer's preset leaves out a tensor that the teacher may have."""
    config = mixer.mixer_config
    if target in NORMED.values():
        return not config.qk_norm
    return target.endswith(".bias") and not (config.output_bias if target.startswith("output.") else config.qkv_bias)


def _folded_norm(
    target: str, mixer: TimeMixer, sources: Mapping[str, Source], tensors: Mapping[str, Tensor]
) -> Tensor | float:
    """Return what the rows of a projection are multiplied with for a norm that only the teacher has, (rows, 1).

    What the norm divides by differs from token to token; its mean over tokens is left to the calibration.
    """
    source = sources.get(NORMED.get(target, ""))
    if source is None or mixer.mixer_config.qk_norm or source.name not in tensors:
        return 1.0
    weight = tensors[source.name].to(mixer.receptance.weight.dtype)
    weight = weight if source.rows is None else weight[source.rows.to(weight.device)]
    weight = (weight + source.plus) * source.factor
    rows = getattr(mixer, target.partition(".")[0]).out_features
    return weight.repeat(rows // len(weight))[:, None]
