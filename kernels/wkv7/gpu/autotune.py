"""Measure configurations on this machine's GPU and write the best into the table.

    python -m rwkvinside.kernels.gpu.autotune                              head size 64, balanced
    python -m rwkvinside.kernels.gpu.autotune --head-sizes 64,128,256 --precisions high,balanced --output mine.json

Nothing here runs during training or decoding, which use the table. For each chunk length the kernels are tuned one
after another, since they share nothing else; the length with the smallest sum wins. Most of the time goes into
compiling: some minutes for each head size and mode. Results depend on the choice only by rounding.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import triton

from rwkvinside.kernels.gpu import table
from rwkvinside.kernels.gpu.decode import plan_step
from rwkvinside.kernels.gpu.launch import Launch
from rwkvinside.kernels.gpu.mixer_step import plan_mixer_step
from rwkvinside.kernels.gpu.op import NARROW, plan_backward, plan_forward
from rwkvinside.kernels.gpu.table import Config, StepConfig, Tuning

DESCRIPTION = "Measure configurations of the WKV-7 kernels on this machine's GPU and write the best into the table."
# The kernels that a part of a configuration decides about.
PARTS = {
    "prep": {"prepare"},
    "scan": {"scan_forward", "scan_backward"},
    "narrow": {"scan_forward", "scan_backward"},
    "grad": {"gradient"},
    "step": {"_step", "_mixer_step"},
}
LENGTHS = (16, 32)  # op.py refuses longer chunks
Measure = Callable[[Config | StepConfig, str], float]


def variants(config: Config | StepConfig, part: str, head_size: int) -> list[Config] | list[StepConfig]:
    """Return configurations that differ from this one in one part only."""
    blocks = [size for size in (16, 32, 64) if size <= head_size]
    changes: list[dict]
    if part == "prep":
        widths = [size for size in (32, 64, 128) if size <= head_size] or [head_size]
        choices = itertools.product(widths, (1, 2, 4))
        changes = [{"prep_block_k": columns, "prep": Tuning(warps, 1)} for columns, warps in choices]
    elif part == "scan":
        choices = itertools.product(blocks, (2, 4, 8), (1, 2, 3))
        changes = [{"block_v": rows, "scan": Tuning(warps, stages)} for rows, warps, stages in choices]
    elif part == "narrow":
        changes = [{"narrow": Tuning(warps, stages)} for warps, stages in itertools.product((1, 2, 4, 8), (2, 3, 4))]
    elif part == "grad":
        rows = [size for size in (64, 128) if size <= head_size] or blocks
        choices = itertools.product(rows, blocks[-1:], (4, 8), (None, 128))
        changes = [
            {"grad_block_v": rows, "grad_block_k": columns, "grad": Tuning(warps, 1, most)}
            for rows, columns, warps, most in choices
        ]
    else:
        changes = [
            {"block_v": rows, "step": Tuning(warps, 1)} for rows, warps in itertools.product(blocks, (1, 2, 4, 8))
        ]
    return [dataclasses.replace(config, **change) for change in changes]


def fastest(config: Config | StepConfig, part: str, head_size: int, measure: Measure):
    """Return the milliseconds and the configuration of the fastest of `variants`.

    Args:
        config, part, head_size: see `variants`.
        measure: returns milliseconds, infinity for what cannot run.
    """
    timed = [(measure(choice, part), choice) for choice in variants(config, part, head_size)]
    return min(timed, key=lambda pair: pair[0])


def tune(start: Config, head_size: int, measure: Measure) -> tuple[float, Config]:
    """Tune part after part, for every length of chunks.

    Returns:
        Milliseconds of forward and backward, and the configuration.
    """
    found = []
    for length in LENGTHS:
        total, config = 0.0, dataclasses.replace(start, length=length)
        for part in ("prep", "scan", "grad"):
            time, config = fastest(config, part, head_size, measure)
            total += time
        found.append((total, config))
    return min(found, key=lambda pair: pair[0])


class OnGPU:
    """Timer of launches on the current device, for one head size and precision mode.

    Args:
        shape: B, T, H.
        head_size: N.
        precision: mode.
        narrow: the scans take the fewest rows at a time, as for few heads.
    """

    def __init__(self, shape: tuple[int, int, int], head_size: int, precision: str, narrow: bool = False):
        B, T, H = shape
        self.precision = precision
        self.block_v = NARROW if narrow else None
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        random = torch.Generator("cuda").manual_seed(0)

        def normal() -> torch.Tensor:
            return torch.randn(B, T, H, head_size, device="cuda", generator=random)

        kk = torch.nn.functional.normalize(normal(), dim=-1)
        values = (normal(), normal(), normal(), -kk, kk * normal().sigmoid())
        self.r, self.k, self.v, self.a, self.b = (value.to(dtype) for value in values)
        self.w = -(0.60653066 * normal().sigmoid())
        self.state = torch.zeros(B, H, head_size, head_size, device="cuda")

    def __call__(self, config: Config | StepConfig, part: str) -> float:
        """Return the milliseconds of a part's launches.

        They are infinite if the GPU lacks the registers or the shared memory.
        """
        launches = [launch for launch in self.plan(config) if launch.kernel.__name__ in PARTS[part]]
        try:
            return triton.testing.do_bench(lambda: [launch.run() for launch in launches], warmup=10, rep=50)
        except triton.runtime.errors.OutOfResources:
            return math.inf

    def plan(self, config: Config | StepConfig) -> list[Launch]:
        """Return the launches of forward and backward, or of the decode steps of the recurrence and of a mixer.

        The buffers between them are uninitialized, because no kernel's time depends on their content.
        """
        inputs = (self.r, self.w, self.k, self.v, self.a, self.b)
        if isinstance(config, StepConfig):
            r, _, k, v, _, _ = token = [x[:, 0] for x in inputs]
            rows, how = r.flatten(1), {"capability": None, "config": config}
            mixer = plan_mixer_step(r, k, v, rows, rows, rows, self.state, rows[0], rows[0], **how)[0]
            return plan_step(*token, self.state, **how)[0] + mixer
        how = {"precision": self.precision, "capability": None, "config": config, "block_v": self.block_v}
        forward, (y, _, starts, rows) = plan_forward(*inputs, **how)
        backward, _ = plan_backward(*inputs, None, None, starts, rows, y, None, **how)
        return forward + backward


def main(arguments: list[str] | None = None) -> int:
    """Tune and write the table; return 0, or 2 if that is not possible."""
    parser = argparse.ArgumentParser(prog="python -m rwkvinside.kernels.gpu.autotune", description=DESCRIPTION)
    parser.add_argument("--head-sizes", default="64", help="comma-separated: 16, 32, 64, 128, 256")
    parser.add_argument("--precisions", default="balanced", help=f"comma-separated: {', '.join(table.PRECISIONS)}")
    parser.add_argument("--shape", default="8,4096,32", metavar="B,T,H", help="batch, tokens and heads to measure with")
    parser.add_argument(
        "--output", type=Path, default=table.SHIPPED, help="file to write; other entries in it are kept"
    )
    args = parser.parse_args(arguments)
    try:
        shape = tuple(int(number) for number in args.shape.split(","))
        sizes = [int(number) for number in args.head_sizes.split(",")]
        starts = {(size, mode): table.lookup(size, None, mode) for size in sizes for mode in args.precisions.split(",")}
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"--shape is {args.shape!r}, expected three positive numbers B,T,H")
        known = table.read(args.output) if args.output.exists() else {}
        if not os.access(args.output.absolute().parent, os.W_OK):
            raise ValueError(f"{args.output.absolute().parent} cannot be written to")
        if not torch.cuda.is_available():
            raise ValueError("no CUDA device")
        major, minor = torch.cuda.get_device_capability()
        for (size, mode), start in starts.items():
            measure = OnGPU(shape, size, mode)
            time, config = tune(start, size, measure)
            _, config = fastest(config, "narrow", size, OnGPU((1, *shape[1:]), size, mode, narrow=True))
            step_time, step = fastest(table.lookup_step(size, None), "step", size, measure)
            if math.isinf(time + step_time):
                raise ValueError(f"no configuration for head size {size} in mode {mode} fits this GPU")
            arch = 10 * major + minor
            known |= {(arch, size, mode): config, (arch, size, table.STEP): step}
            table.write(args.output, known)
            print(f"sm_{arch}/{size}/{mode}: forward and backward {time:.3f} ms, {config}", flush=True)
            print(f"sm_{arch}/{size}/{table.STEP}: {step_time:.3f} ms, {step}", flush=True)
    except (ValueError, RuntimeError) as error:
        print(f"cannot autotune: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
