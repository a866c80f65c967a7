"""The transfer of a teacher's attention into a mixer, by the table of its family."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..modeling.time_mixer import TimeMixer


@torch.no_grad()
def transfer(attention: nn.Module, mixer: TimeMixer, weight_map: Mapping[str, str]) -> None:
    """Copy the teacher's projections and norms into the mixer, bit for bit.

    Args:
        attention: the teacher's.
        mixer: changed in place.
        weight_map: the family's, tensor of the attention -> tensor of the mixer.

    Raises:
        ValueError: a teacher tensor that the mixer does not have (q/k norms and a preset without them, for example), or
            a shape that does not fit.
    """
    targets = dict(mixer.named_parameters())
    for name, source in attention.named_parameters():
        target = targets.get(weight_map.get(name, ""))
        if target is None:
            raise ValueError(f"the teacher's attention has {name}, which this mixer preset does not have")
        if target.shape != source.shape:
            raise ValueError(f"{name} has shape {tuple(source.shape)}, the mixer needs {tuple(target.shape)}")
        target.copy_(source)
