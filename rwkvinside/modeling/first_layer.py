"""What crosses layers within one forward call: v_first, k_first, its settings, and states that rows go on from.

A new object is made for every forward call of the whole model and handed to each layer as the keyword argument
`forward_context` (Hugging Face decoder layers pass unknown keyword arguments on to their attention). Nothing is kept
on a module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class FirstLayerKV(NamedTuple):
    """Value and key of the first RWKV layer, (B, T, heads, N).

    k is None for mixers without a key residual.
    """

    v: Tensor
    k: Tensor | None

    def detach(self) -> FirstLayerKV:
        """Return the same values without gradient."""
        return FirstLayerKV(self.v.detach(), None if self.k is None else self.k.detach())


class VFirstHolder:
    """The way of v_first and k_first from the first RWKV layer to the later ones.

    Gradients pass through it. The logical tensor has shape (world_size, B, T, width), where width is that of keys and
    values, heads * N: the hidden size where attention has no groups. Each rank holds its own slice, so data parallel
    and ZeRO runs exchange nothing. `gather` assembles the logical tensor for inspection; `to_tensors` /
    `from_tensors` are what pipeline stages put into the tuple they exchange; `broadcast` serves inference where one
    rank computes the first layer.

    The first RWKV layer always writes and the later ones always read. Nothing branches on "was it written": a
    recomputed activation checkpoint would take the other branch.
    """

    def __init__(self) -> None:
        self._first: FirstLayerKV | None = None

    def write(self, first: FirstLayerKV) -> None:
        """Store the value and key of the first RWKV layer.

        A recomputation in the backward writes the same values again.
        """
        self._first = first

    def read(self) -> FirstLayerKV:
        """Return the first layer's value and key.

        Raises:
            RuntimeError: a later layer ran before the first one, which only a wrongly built model does.
        """
        if self._first is None:
            raise RuntimeError("v_first was read before the first RWKV layer wrote it")
        return self._first

    def to_tensors(self) -> tuple[Tensor, ...]:
        """Return (v,) or (v, k), to be sent to the next pipeline stage.

        Autograd crosses ranks with them.
        """
        return tuple(t for t in self.read() if t is not None)

    @classmethod
    def from_tensors(cls, tensors: tuple[Tensor, ...]) -> VFirstHolder:
        """Return the holder that `to_tensors` was called on, on the receiving stage."""
        holder = cls()
        holder.write(FirstLayerKV(tensors[0], tensors[1] if len(tensors) > 1 else None))
        return holder

    def gather(self, group: dist.ProcessGroup | None = None) -> FirstLayerKV:
        """Return the logical tensors (world_size, B, T, width), detached, on every rank.

        Every rank must call it, with the same shape (B, T). Without a process group the world size is 1.
        """

        def assemble(x: Tensor) -> Tensor:
            local = x.detach().flatten(2).contiguous()
            if not dist.is_initialized():
                return local[None]
            slices = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
            dist.all_gather(slices, local, group=group)
            return torch.stack(slices)

        first = self.read()
        return FirstLayerKV(assemble(first.v), None if first.k is None else assemble(first.k))

    def broadcast(self, src: int, group: dist.ProcessGroup | None = None) -> None:
        """Overwrite this rank's slice with that of global rank `src`, without gradient.

        Every rank must hold a tensor of the same shape already.
        """
        received = []
        for x in self.to_tensors():
            x = x.detach().contiguous().clone()
            dist.broadcast(x, src=src, group=group)
            received.append(x)
        self.write(VFirstHolder.from_tensors(tuple(received)).read())


@dataclass
class ForwardContext:
    """One forward call of a hybrid model, seen by every layer.

    Attributes:
        mode: "student" (RWKV layers run their mixer), "teacher" (their frozen attention), "control" (that, cut to the
            mixer's window), or "align" (mixer and attention, the layer's output is the latter's). Exported models know
            "student" only.
        mask: (B, T) bool over the tokens of this call, True = real; None when there is no padding.
        cu_seqlens: (S + 1,) int32 document boundaries over the flattened B*T tokens, rows included; None when every
            row is one document.
        recompute: what of mixers is computed again in the backward instead of being kept: "mixers" (in align), or
            "recurrence", what lies between their projections; None: nothing.
        norms: align only: the norms of the teacher are asked for.
        errors: align only, written per layer: squared error and squared norm of the teacher, both 0-d sums over real
            tokens; the latter None where nobody asks for it.
        first: v_first and k_first of this call.
        layer_modes: modes of single layers in place of `mode`; "kept" is "teacher" as a hybrid keeps attention.
        provider: the layer whose own value and key are the first ones of this call, where the first RWKV layer runs its
            attention; None: that layer.
        carried: in training, what gives each layer the states that rows begin with, and takes those that they leave
            (`hybrid.carried_rows`, which exports do without); None: rows begin anew.
    """

    mode: str = "student"
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    recompute: str | None = None
    norms: bool = True
    errors: dict[int, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    first: VFirstHolder = field(default_factory=VFirstHolder)
    layer_modes: Mapping[int, str] = field(default_factory=dict)
    provider: int | None = None
    carried: Any = None
