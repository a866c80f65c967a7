"""The stage `peers`: the same problems by flash-linear-attention and by attention, next to ours in the same process.

fla's kernels try hundreds of configurations when first called, which would take the whole session: each gets `TRIED` of
its own here, and the results say so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import triton

from ...kernels.bench.candidates import Candidate, choose
from ...kernels.bench.problem import Shape, make_inputs, make_pass
from .timing import milliseconds

if TYPE_CHECKING:
    from .stage import Stage

TRIED = 2


def run(stage: Stage) -> None:
    """Time forward, and forward with backward, of each peer."""
    shapes = [Shape(1, 64, 2, 16)] if stage.dry else [Shape(8, 4096, 64, 64), Shape(8, 4096, 32, 128)]
    names = ["chunked", "attention"] if stage.dry else ["triton:balanced", "attention", "fla:chunk"]
    if importlib.util.find_spec("fla") is None:
        stage.record("fla", skipped="flash-linear-attention is not installed")
        names = [name for name in names if not name.startswith("fla")]
    _cut_autotuning()
    for shape in shapes:
        for candidate in choose(names):
            stage.attempt(f"{candidate.name} {shape}", partial(times, candidate, shape, stage.device), needs=5)


def _cut_autotuning() -> None:
    """Make every Triton kernel that is defined from now on try `TRIED` configurations, not all."""
    original: Callable = triton.autotune

    def few(configs, *args, **options):
        return original(configs[:TRIED], *args, **options)

    triton.autotune = few  # type: ignore[assignment]


def times(candidate: Candidate, shape: Shape, device: str) -> dict:
    """Return milliseconds of both passes with each of a candidate's settings."""
    inputs = make_inputs(shape, torch.bfloat16, device)
    found: dict = {"tried": TRIED} if candidate.name.startswith("fla") else {}
    for setting, op in candidate.ops(device, shape.T).items():
        both = make_pass(op, "forward_backward", inputs, None)
        name = f"{setting} " if setting else ""
        found[f"{name}forward_ms"] = milliseconds(make_pass(op, "forward", inputs, None), device, 10)
        found[f"{name}forward_backward_ms"] = milliseconds(both, device, 10)
    return found
