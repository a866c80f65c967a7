"""Problems of the WKV-7 kernels as values, so that what will be launched can be compiled first, checked and timed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ...kernels.gpu.launch import Launch
from ...kernels.gpu.op import choose_split, plan_backward, plan_forward
from ...kernels.gpu.table import Config, lookup

DECAY_BOUND = -math.exp(-0.5)
Capability = tuple[int, int] | None  # compute capability of a GPU; None is Triton's interpreter


@dataclass(frozen=True)
class Case:
    """One problem and how it is computed.

    Attributes:
        batch, time, heads, size: B, T, H, N.
        precision: mode of the kernels.
        groups: heads of k, v, a and b; None is H.
        block_v: rows of the state per program of a scan; None is the configuration's.
        segments: pieces of a scan.
        config: None is the table's.
    """

    batch: int
    time: int
    heads: int
    size: int
    precision: str = "balanced"
    groups: int | None = None
    block_v: int | None = None
    segments: int = 1
    config: Config | None = None

    @property
    def padded(self) -> int:
        """Return N padded to a power of two."""
        return max(16, triton.next_power_of_2(self.size))

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of all inputs but the log decay."""
        return torch.float32 if self.precision == "fp32" else torch.bfloat16

    @property
    def name(self) -> str:
        """Return B,T,H,N and what differs from the default."""
        text = f"{self.batch},{self.time},{self.heads},{self.size} {self.precision}"
        extras = {"G": self.groups, "BV": self.block_v, "segments": self.segments if self.segments > 1 else None}
        extras["L"] = self.config and self.config.length
        return " ".join([text, *(f"{key}={value}" for key, value in extras.items() if value is not None)])

    def placeholders(self) -> list[Tensor]:
        """Return r, w, k, v, a, b without memory."""
        shape = (self.batch, self.time, self.heads, self.size)
        grouped = (self.batch, self.time, self.groups or self.heads, self.size)
        r = torch.empty(shape, dtype=self.dtype, device="meta")
        k = torch.empty(grouped, dtype=self.dtype, device="meta")
        return [r, torch.empty(shape, device="meta"), k, k, k, k]

    def inputs(self, device: str, seed: int = 0, decay: float | None = None, one_key: bool = False) -> list[Tensor]:
        """Return random r, w, k, v, a, b as the mixer makes them.

        Args:
            device: where.
            seed: of the numbers.
            decay: every log decay, None for random gates that differ between heads.
            one_key: a single key for all tokens, almost wholly removed at each.
        """
        random = torch.Generator(device).manual_seed(seed)

        def normal(heads: int, time: int = self.time) -> Tensor:
            return torch.randn(self.batch, time, heads, self.size, generator=random, device=device)

        groups = self.groups or self.heads
        direction = F.normalize(normal(groups, 1 if one_key else self.time), dim=-1)
        direction = direction.expand(self.batch, self.time, groups, self.size)
        rate = torch.full_like(direction, 0.99) if one_key else normal(groups).sigmoid()
        r, k, v = normal(self.heads), normal(groups), normal(groups)
        shift = torch.linspace(-3, 1, self.heads, device=device)[:, None]
        w = DECAY_BOUND * (normal(self.heads) + shift).sigmoid() if decay is None else torch.full_like(r, decay)
        k = direction.clone() if one_key else k
        r, k, v, a, b = (x.to(self.dtype) for x in (r, k, v, -direction, direction * rate))
        return [r, w, k, v, a, b]

    def ends(self) -> dict[str, Tensor]:
        """Return what `plan` takes beside the inputs, without memory: a state, gradients of y and the final state."""
        state = torch.empty(self.batch, self.heads, self.size, self.size, device="meta")
        dy = torch.empty(self.batch, self.time, self.heads, self.size, dtype=self.dtype, device="meta")
        return {"state": state, "dy": dy, "dfinal": state}

    def plan(
        self,
        inputs: list[Tensor],
        capability: Capability,
        state: Tensor | None = None,
        dy: Tensor | None = None,
        dfinal: Tensor | None = None,
    ) -> Plan:
        """Return the launches of forward and backward and their results, launching nothing.

        Args:
            inputs: r, w, k, v, a, b.
            capability: of the GPU; None is Triton's interpreter.
            state: before the first token; None is zero.
            dy, dfinal: gradients of y and of the final state; None is y itself, and zero.
        """
        how = self._how(capability)
        forward, (y, final, starts, u) = plan_forward(*inputs, state, **how)
        dy = y if dy is None else dy
        backward, grads = plan_backward(*inputs, None, None, starts, u, dy, dfinal, **how)
        return Plan(forward, backward, y, final, list(grads))

    def inference(self, capability: Capability, masked: bool = False, sequences: int | None = None) -> list[Launch]:
        """Return the launches of a forward that no backward follows, without memory.

        Args:
            capability: of the GPU.
            masked: with a mask of the tokens.
            sequences: that are packed in a row; None: a row is one.
        """
        mask = torch.empty(self.batch, self.time, dtype=torch.bool, device="meta") if masked else None
        bounds = None if sequences is None else torch.empty(sequences + 1, dtype=torch.int32, device="meta")
        how = self._how(capability)
        return plan_forward(*self.placeholders(), None, mask, bounds, save=False, **how)[0]

    def as_called(self, capability: Capability, processors: int) -> Case:
        """Return the case with the rows and segments that `wkv7` chooses on a GPU with so many multiprocessors."""
        config = self.config or lookup(self.padded, capability, self.precision)
        split = choose_split(self.batch * self.heads, self.time // config.length, self.padded, config, processors)
        return replace(self, block_v=split[0], segments=split[1])

    def _how(self, capability: Capability) -> dict[str, Any]:
        how = {"precision": self.precision, "capability": capability, "config": self.config}
        return {**how, "block_v": self.block_v, "segments": self.segments}


@dataclass(frozen=True)
class Plan:
    """The launches of a case and the buffers that hold their results."""

    forward: list[Launch]
    backward: list[Launch]
    y: Tensor
    final: Tensor
    grads: list[Tensor]

    @property
    def launches(self) -> list[Launch]:
        """Return all launches in order."""
        return [*self.forward, *self.backward]
