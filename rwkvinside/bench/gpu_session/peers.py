"""The stage `peers`: the same problems by flash-linear-attention and by attention, next to ours in the same process.

fla's kernels try hundreds of configurations when first called, which would take the whole session: each gets `TRIED` of
its own here, and the results say so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import triton

from ...kernels.bench.candidates import Candidate, Op, choose
from ...kernels.bench.problem import PASSES, Shape, make_inputs, make_pass
from .timing import milliseconds

if TYPE_CHECKING:
    from .stage import Stage

TRIED = 2


def run(stage: Stage) -> None:
    """Time forward, and forward with backward, of each peer with each of its settings."""
    shapes = [Shape(1, 64, 2, 16)] if stage.dry else [Shape(8, 4096, 64, 64), Shape(8, 4096, 32, 128)]
    names = ["chunked", "attention"] if stage.dry else ["triton:balanced", "attention", "fla:chunk"]
    if importlib.util.find_spec("fla") is None:
        stage.record("fla", skipped="flash-linear-attention is not installed")
        names = [name for name in names if not name.startswith("fla")]
    _cut_autotuning()
    for shape in shapes:
        for candidate in choose(names):
            try:
                ops = candidate.ops(stage.device, shape.T)
            except RuntimeError as error:  # a package that cannot be imported
                stage.record(f"{candidate.name} {shape}", skipped=str(error))
                continue
            for setting, op in ops.items():
                what = f"{candidate.name} {shape} {setting}".rstrip()
                stage.attempt(what, partial(times, candidate, op, shape, stage.device), needs=5)


def _cut_autotuning() -> None:
    """Make every Triton kernel that is defined from now on try `TRIED` configurations, not all."""
    original: Callable = triton.autotune

    def few(configs: list, *args: Any, **options: Any) -> Callable:
        return original(configs[:TRIED], *args, **options)

    triton.autotune = few


def times(candidate: Candidate, op: Op, shape: Shape, device: str) -> dict:
    """Return milliseconds of both passes with one of a candidate's settings."""
    inputs = make_inputs(shape, torch.bfloat16, device)
    passes = {name: make_pass(op, name, inputs, None) for name in PASSES}
    found: dict = {f"{name}_ms": milliseconds(run, device, 10) for name, run in passes.items()}
    return found | ({"tried": TRIED} if candidate.name.startswith("fla") else {})
