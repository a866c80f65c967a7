"""The transfer of a teacher's attention into a mixer and back, by the table of its family."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..families.base import Source
from ..modeling.time_mixer import TimeMixer


@torch.no_grad()
def transfer(attention: nn.Module, mixer: TimeMixer, sources: Mapping[str, Source]) -> None:
    """Copy the teacher's projections and norms into the mixer.

    Bit for bit, but where a `Source` adds or multiplies.

    Args:
        attention: the teacher's.
        mixer: changed in place.
        sources: the family's, by tensor of the mixer.

    Raises:
        ValueError: a teacher tensor that the mixer does not have (q/k norms and a preset without them, for example), or
            a shape that does not fit.
    """
    targets, tensors = dict(mixer.named_parameters()), dict(attention.named_parameters())
    used = {source.name for target, source in sources.items() if target in targets}
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
        target.copy_((value + source.plus) * source.factor)


@torch.no_grad()
def teacher_tensor(name: str, mixer: TimeMixer, sources: Mapping[str, Source]) -> Tensor | None:
    """Return a tensor of the teacher's attention from its copies in the mixer: `transfer` backwards.

    Args:
        name: in the attention.
        mixer: which has not trained yet.
        sources: the family's.

    Returns:
        In the mixer's dtype; None: the mixer has no copy of it.
    """
    targets = dict(mixer.named_parameters())
    parts = {target: source for target, source in sources.items() if source.name == name and target in targets}
    if not parts:
        return None
    values = torch.cat([targets[target] / source.factor - source.plus for target, source in parts.items()])
    rows = [source.rows for source in parts.values() if source.rows is not None]
    return values if not rows else torch.empty_like(values).index_copy_(0, torch.cat(rows).to(values.device), values)
