"""Tile sizes and launch settings of the Triton kernels, per head size, architecture and precision mode.

The numbers are in `configurations.json` next to this file, so that a first step on a GPU never autotunes. They were
chosen by compiling (`python -m rwkvinside.kernels.gpu.compile`: no spills, occupancy), and `python -m
rwkvinside.kernels.gpu.autotune` replaces them with numbers measured on the GPU at hand. This module imports neither
torch nor triton; it launches and compiles nothing.

Decoding computes in fp32 whatever the inputs are, so it has one entry per head size and architecture, a `StepConfig`;
the training kernels have one for each precision mode, a `Config`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rwkvinside.support.files import write_text

SHIPPED = Path(__file__).with_name("configurations.json")
HEAD_SIZES = (16, 32, 64, 128, 256)
PRECISIONS = ("fp32", "high", "balanced", "fast")
STEP = "step"
LENGTHS = (16, 32, 64)


@dataclass(frozen=True)
class Tuning:
    """Settings with which Triton compiles one kernel.

    Attributes:
        num_warps, num_stages: as Triton takes them.
        max_registers: per thread, so that more programs fit on a multiprocessor; None: as many as ptxas likes.
    """

    num_warps: int
    num_stages: int
    max_registers: int | None = None


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch settings of the training kernels.

    Attributes:
        length: tokens per chunk (L), the same for the four training kernels: 16, 32 or 64.
        block_v: rows of the state held by one program of the scans.
        prep, scan, grad: settings of `prepare`, of the two scans, of `gradient`.
        narrow: settings of the scans where they work on the fewest rows instead (few heads, see `op.choose_split`).
        prep_block_k: columns of K worked on at a time in `prepare`.
        grad_block_v: rows of V worked on at a time in `gradient`.
        grad_block_k: columns of K worked on at a time in `gradient`.
    """

    length: int
    block_v: int
    prep: Tuning
    prep_block_k: int
    scan: Tuning
    narrow: Tuning
    grad: Tuning
    grad_block_v: int
    grad_block_k: int

    def __post_init__(self):
        if self.length not in LENGTHS:
            raise ValueError(f"length is {self.length}, must be one of {LENGTHS}")
        _check_blocks(self.block_v, self.prep_block_k, self.grad_block_v, self.grad_block_k)


@dataclass(frozen=True)
class StepConfig:
    """Tile size and launch settings of a decode step.

    Attributes:
        block_v: rows of the state held by one program.
        step: settings of the kernel.
    """

    block_v: int
    step: Tuning

    def __post_init__(self):
        _check_blocks(self.block_v)


def _check_blocks(*sizes: int) -> None:
    if any(size < 16 or size & (size - 1) for size in sizes):
        raise ValueError(f"block sizes must be powers of two of at least 16, got {sizes}")


Key = tuple[int, int, str]  # architecture as in sm_90, padded head size, precision mode or STEP
Table = Mapping[Key, Config | StepConfig]


def lookup(head_size: int, capability: tuple[int, int] | None, precision: str) -> Config:
    """Return the configuration for a padded head size.

    Args:
        head_size: a power of two from 16 to 256.
        capability: the GPU's compute capability, e.g. (9, 0). An architecture without entries uses the nearest older
            one that has some; one older than all, and None (Triton's interpreter), use the oldest.
        precision: "fp32", "high", "balanced" or "fast".

    Raises:
        ValueError: an unknown head size or precision.
        RuntimeError: a table that cannot be read or lacks an entry.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: choose one of {', '.join(PRECISIONS)}")
    return _nearest(head_size, capability, precision)


def lookup_step(head_size: int, capability: tuple[int, int] | None) -> StepConfig:
    """Return the configuration of a decode step; arguments and errors as `lookup`."""
    return _nearest(head_size, capability, STEP)


def _nearest(head_size: int, capability: tuple[int, int] | None, mode: str):
    if head_size not in HEAD_SIZES:
        raise ValueError(f"head size {head_size} is none of {HEAD_SIZES}")
    wanted = 0 if capability is None else 10 * capability[0] + capability[1]
    table = _shipped()
    known = sorted(key[0] for key in table if key[1:] == (head_size, mode))
    if not known:
        raise RuntimeError(f"{SHIPPED} has no entry for head size {head_size}, {mode}")
    return table[max((arch for arch in known if arch <= wanted), default=known[0]), head_size, mode]


@functools.cache
def _shipped() -> Table:
    return read(SHIPPED)


def read(path: Path) -> dict[Key, Config | StepConfig]:
    """Return the entries of a configurations file.

    Raises:
        RuntimeError: the file is missing or has another format; the message names it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return dict(_entry(name, fields) for name, fields in content.items())
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RuntimeError(f"cannot read WKV-7 configurations from {path}: {error}") from error


def _entry(name: str, fields: dict) -> tuple[Key, Config | StepConfig]:
    architecture, size, mode = name.split("/")
    key = (int(architecture.removeprefix("sm_")), int(size), mode)
    if key[1] not in HEAD_SIZES or mode not in (*PRECISIONS, STEP):
        raise ValueError(f"entry {name!r} is not sm_<number>/<head size>/<precision or {STEP}>")
    values = {field: Tuning(**value) if isinstance(value, dict) else value for field, value in fields.items()}
    return key, (StepConfig if mode == STEP else Config)(**values)


def write(path: Path, table: Table) -> None:
    """Write entries as `read` takes them, atomically."""
    keys = sorted(table, key=lambda key: (*key[:2], (*PRECISIONS, STEP).index(key[2])))

    def said(fields: list[tuple[str, Any]]) -> dict:
        return {name: value for name, value in fields if value is not None}

    lines = [f'  "sm_{key[0]}/{key[1]}/{key[2]}": {json.dumps(asdict(table[key], dict_factory=said))}' for key in keys]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")
