"""Problems of the WKV-7 kernels as values, so that what will be launched can be compiled first, checked and timed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ...kernels.gpu.launch import Launch
from ...kernels.gpu.op import plan_backward, plan_forward
from ...kernels.gpu.table import Config, Tuning, lookup

DECAY_BOUND = -math.exp(-0.5)


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

    def plan(self, inputs: list[Tensor], capability: tuple[int, int] | None, state=None, dy=None, dfinal=None) -> Plan:
        """Return the launches of forward and backward and their results, launching nothing."""
        how: dict = {"precision": self.precision, "capability": capability, "config": self.config}
        how |= {"block_v": self.block_v, "segments": self.segments}
        forward, (y, final, starts, u) = plan_forward(*inputs, state, **how)
        dy = y if dy is None else dy
        backward, grads = plan_backward(*inputs, None, None, starts, u, dy, dfinal, **how)
        return Plan(forward, backward, y, final, list(grads))


@dataclass(frozen=True)
class Plan:
    """The launches of a case and the buffers that hold their results."""

    forward: list[Launch]
    backward: list[Launch]
    y: Tensor
    final: Tensor
    grads: list[Tensor]


def large_cases() -> list[Case]:
    """Return the cases that are checked at their full size."""
    return [
        Case(8, 4096, 64, 64),
        Case(8, 4096, 32, 128),
        Case(4, 4096, 16, 128, groups=8),
        Case(1, 4096, 32, 64, block_v=16, segments=4),
    ]


SIZES = (40, 64, 128, 256)
BLOCKS = (16, 32, 64)


def correctness_cases(dry: bool) -> Iterator[Case]:
    """Yield the cases that are compared with float64."""
    if dry:
        yield Case(1, 40, 2, 16, "balanced", block_v=16)
        yield Case(1, 40, 2, 16, "fp32", block_v=16, segments=2)
        return
    for size in SIZES:
        for rows in BLOCKS:
            yield Case(1, 700, 3, size, block_v=rows)
    for precision in ("fast", "high", "fp32"):  # with the rows that the table has for them
        for size in SIZES:
            yield Case(1, 700, 3, size, precision)
    for segments in (2, 5):
        for precision in ("balanced", "fp32"):
            yield Case(1, 700, 3, 64, precision, block_v=16, segments=segments)
    yield Case(2, 700, 6, 64, "balanced", groups=2)
    yield Case(2, 700, 6, 128, "balanced", groups=3)


def short_chunks(size: int) -> Config:
    """Return the table's configuration with chunks of 16 tokens: less work within a chunk, more states."""
    return replace(lookup(size, (9, 0), "balanced"), length=16, prep=Tuning(2, 1))


def timed_cases(dry: bool) -> list[Case]:
    """Return the cases that are timed with the table's configuration, the most important first."""
    if dry:
        return [Case(1, 64, 2, 16)]
    return [
        Case(8, 4096, 64, 64),
        Case(8, 4096, 32, 128),
        Case(32, 512, 16, 128),
        Case(4, 4096, 16, 128, groups=8),
        Case(8, 4096, 64, 64, config=short_chunks(64)),
        Case(8, 4096, 32, 128, config=short_chunks(128)),
        Case(1, 4096, 32, 64, block_v=16),
        Case(1, 4096, 32, 64, block_v=16, segments=4),
        Case(8, 4096, 16, 256),
        Case(8, 4096, 64, 64, "fast"),
        Case(8, 4096, 64, 64, "high"),
        Case(8, 4096, 64, 64, "fp32"),
        Case(8, 4096, 32, 128, "fp32"),
    ]


# Of each part: tokens of a chunk, warps, stages, registers, rows and columns at a time (16 where it has none)
CHOICES: dict[str, list[tuple[int, int, int, int | None, int, int]]] = {
    "scan": [
        *((32, 4, 3, None, 64, 16), (32, 4, 3, None, 32, 16), (32, 8, 3, None, 64, 16)),
        *((16, 4, 3, None, 64, 16), (16, 4, 4, None, 64, 16), (16, 4, 3, None, 32, 16), (16, 4, 4, None, 32, 16)),
        *((16, 2, 3, None, 32, 16), (16, 2, 4, None, 32, 16), (16, 8, 4, None, 64, 16)),
    ],
    "narrow": [
        *((32, 4, 3, None, 16, 16), (32, 2, 3, None, 16, 16), (32, 1, 3, None, 16, 16), (32, 4, 4, None, 16, 16)),
        *((16, 4, 3, None, 16, 16), (16, 2, 3, None, 16, 16), (16, 1, 3, None, 16, 16), (16, 2, 4, None, 16, 16)),
    ],
    "prep": [
        *((32, 4, 1, None, 16, 64), (32, 4, 1, 168, 16, 64), (32, 4, 1, 128, 16, 64), (32, 8, 1, None, 16, 64)),
        *((32, 8, 1, 128, 16, 64), (32, 8, 1, None, 16, 128)),
        *((16, 1, 1, None, 16, 64), (16, 1, 1, None, 16, 32), (16, 1, 1, 128, 16, 32)),
        *((16, 2, 1, None, 16, 64), (16, 2, 1, 168, 16, 64), (16, 2, 1, 128, 16, 64), (16, 2, 1, None, 16, 32)),
        *((16, 2, 1, 104, 16, 32), (16, 4, 1, None, 16, 64), (16, 4, 1, 168, 16, 64), (16, 4, 1, 128, 16, 64)),
        *((16, 4, 1, None, 16, 128), (16, 4, 1, 168, 16, 128)),
    ],
    "grad": [
        *((32, 8, 1, None, 32, 64), (32, 8, 1, None, 64, 64), (32, 8, 1, 128, 64, 64), (32, 8, 1, 128, 128, 64)),
        *((32, 4, 1, None, 32, 64), (32, 4, 1, None, 64, 64)),
        *((16, 4, 1, None, 64, 64), (16, 4, 1, 128, 64, 64), (16, 4, 1, 104, 64, 64), (16, 4, 1, 128, 32, 64)),
        *((16, 2, 1, None, 64, 32), (16, 2, 1, 128, 64, 32), (16, 2, 1, None, 64, 64), (16, 4, 1, 104, 64, 32)),
        *((16, 4, 1, None, 128, 64), (16, 4, 1, 128, 128, 64), (16, 8, 1, 128, 128, 128), (16, 8, 1, 128, 64, 64)),
    ],
}


def variants(case: Case, part: str, capability: tuple[int, int] | None) -> list[Case]:
    """Return the case with every configuration worth trying for a part of it.

    Args:
        case: with the table's configuration.
        part: "scan", "narrow", "prep" or "grad".
        capability: of the GPU.
    """
    config = lookup(case.padded, capability, case.precision)
    found: list[Config] = []
    for length, warps, stages, registers, rows, columns in CHOICES[part]:
        if max(rows, columns) > case.padded:
            continue
        tuning = Tuning(warps, stages, registers)
        changes: dict = {part: tuning, "length": length}
        if part == "scan":
            changes["block_v"] = rows
        elif part == "narrow":
            changes["block_v"] = 64  # so that 16 rows are the narrow ones
        elif part == "prep":
            changes["prep_block_k"] = columns
        else:
            changes |= {"grad_block_v": rows, "grad_block_k": columns}
        found.append(replace(config, **changes))
    return [replace(case, config=each, block_v=16 if part == "narrow" else None) for each in found]


PARTS = {
    "scan": {"scan_forward", "scan_backward"},
    "narrow": {"scan_forward", "scan_backward"},
    "prep": {"prepare"},
    "grad": {"gradient"},
}


def varied_cases(dry: bool) -> list[tuple[Case, str]]:
    """Return the cases for which configurations are compared, and the part that varies."""
    if dry:
        return [(Case(1, 32, 1, 16), "prep"), (Case(1, 32, 1, 16), "grad")]
    wide, wider = Case(8, 4096, 64, 64), Case(8, 4096, 32, 128)
    small, smaller = Case(1, 4096, 32, 64), Case(1, 4096, 16, 128)
    return [
        (wide, "scan"), (wide, "prep"), (wider, "scan"), (wider, "prep"), (small, "narrow"), (smaller, "narrow"),
        (wide, "grad"), (wider, "grad"),
    ]  # fmt: skip
