"""WKV-7 kernels side by side: time, memory and error of ours and of their alternatives.

    python -m rwkvinside.kernels.bench [--shapes "B,T,H,N;..."] [--candidates triton,fla] [--decode] [--json FILE]

This file is the command: stages, tables, JSON. Its flags are in `arguments`, the implementations in `candidates`, their
inputs in `problem`, the measurement in `measure`. Needs only torch; the figure needs matplotlib.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import math
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from rwkvinside.errors import UserError
from rwkvinside.kernels.bench.candidates import CANDIDATES, Candidate, choose
from rwkvinside.kernels.bench.measure import Bench, copy_bandwidth
from rwkvinside.kernels.bench.problem import DTYPES, Shape
from rwkvinside.support.files import write_json

SHAPES = {
    "cpu": "1,512,8,64;1,2048,8,64;1,8192,8,64",
    "cuda": "1,4096,32,64;4,4096,32,64;8,4096,32,64;8,4096,64,64;1,4096,32,128;8,4096,32,128;8,4096,16,256",
}
DECODE_SHAPES = {"cpu": "1,1,32,64;16,1,32,64", "cuda": "1,1,32,64;64,1,32,64;512,1,32,64"}
SUITE_SECONDS = 430  # nothing new starts after that; a running compilation is not interrupted


@dataclass(frozen=True)
class Stage:
    """Problems that are measured with the same candidates; decoding if T = 1.

    Attributes:
        title: above the tables.
        shapes: the problems.
        dtype: key of `DTYPES`, for everything but the log decay and the state.
        candidates: implementations to measure.
        drawn: whether the figure shows it.
    """

    title: str
    shapes: list[Shape]
    dtype: str
    candidates: list[Candidate]
    drawn: bool = True


def gpu_suite() -> list[Stage]:
    """Return the stages for a new GPU, the most informative first.

    fla comes late, because its kernels try settings for minutes. Every stage measures errors; those named so are for
    modes and head sizes that no other stage has.
    """
    long, steps = parse_shapes(SHAPES["cuda"]), parse_shapes(DECODE_SHAPES["cuda"])
    few = parse_shapes("8,4096,32,64;8,4096,64,64;8,4096,32,128")
    small, wide = parse_shapes("2,256,4,64;2,250,3,40"), parse_shapes("2,256,4,128;2,256,4,256")
    return [
        Stage("errors", small, "bf16", choose(["triton", "chunked"]), drawn=False),
        Stage("errors", small, "fp32", choose(["triton", "chunked"]), drawn=False),
        Stage("sequences", long, "bf16", choose(["triton:high", "triton:balanced", "triton:fast", "attention"])),
        Stage("decoding", steps, "bf16", choose(["triton:balanced", "reference"], decode=True)),
        Stage("next to fla", few, "bf16", choose(["triton:balanced", "triton:fast", "chunked", "fla:chunk"])),
        Stage("decoding, next to fla", steps, "bf16", choose(["triton:balanced", "fla:recurrent"], decode=True)),
        Stage("errors", wide, "fp32", choose(["triton:fp32", "chunked"]), drawn=False),
    ]


def parse_shapes(text: str) -> list[Shape]:
    """Parse "B,T,H,N;...".

    Raises:
        UserError: the text is anything else.
    """
    shapes = []
    for part in text.split(";"):
        try:
            shape = Shape(*(int(size) for size in part.split(",")))
        except (ValueError, TypeError):
            raise UserError(f"--shapes: {part!r} is not B,T,H,N") from None
        if min(shape) < 1:
            raise UserError(f"--shapes: {part!r} has a size below 1")
        shapes.append(shape)
    return shapes


def main(args: argparse.Namespace) -> int:
    """Measure, print a table per shape, write JSON and PNG.

    Raises:
        UserError: arguments that do not work, before anything is measured.
    """
    start = time.monotonic()
    device, stages = _plan(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    bandwidth = copy_bandwidth(device)
    deadline = start + SUITE_SECONDS if args.suite else math.inf
    bench = Bench(device, args.repeats, args.seconds, bandwidth, deadline)
    report = {"format": 1, "machine": _machine(device), "copy_bytes_per_s": bandwidth, "repeats": args.repeats}
    report["stages"] = []
    for stage in stages:
        measured = {"title": stage.title, "dtype": stage.dtype, "shapes": []}
        report["stages"].append(measured)
        for shape in stage.shapes:
            measured["shapes"].append(bench.problem(stage.candidates, shape, DTYPES[stage.dtype]))
            where = f"{report['machine']['device']}, copy {bandwidth / 1e9:.3g} GB/s"
            print(f"{stage.title}: {shape}, {stage.dtype}, {where}", *_table(measured["shapes"][-1]), "", sep="\n")
            if args.json:
                write_json(args.json, report)
    if args.png:
        from rwkvinside.report.figures import kernel_figure, save_figure

        drawn = [measured for stage, measured in zip(stages, report["stages"], strict=True) if stage.drawn]
        figure = kernel_figure(drawn, report["machine"]["device"])
        if figure is None:
            print(f"nothing ran, so {args.png} was not drawn", file=sys.stderr)
        else:
            save_figure(figure, args.png)
    return 0


def _plan(args: argparse.Namespace) -> tuple[str, list[Stage]]:
    """Check the arguments; return the device and the stages that they ask for."""
    device = args.device or ("cuda" if torch.cuda.is_available() or args.suite == "gpu" else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch finds no CUDA device" + (", --suite gpu needs one" if args.suite else ""))
    for name in ("threads", "repeats", "seconds"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} is {value}", "give a number above 0")
    for path in filter(None, (args.json, args.png)):
        if not path.parent.is_dir():
            raise UserError(f"{path}: there is no directory {path.parent}")
    if args.png and importlib.util.find_spec("matplotlib") is None:
        raise UserError("--png needs matplotlib, which is not installed")
    if args.suite:
        conflicting = [name for name in ("shapes", "dtype", "candidates", "decode") if getattr(args, name)]
        if conflicting or device == "cpu":
            raise UserError(f"--suite gpu cannot be used with --{conflicting[0] if conflicting else 'device cpu'}")
        return device, gpu_suite()
    shapes = parse_shapes(args.shapes or (DECODE_SHAPES if args.decode else SHAPES)[device])
    for shape in shapes:
        if (shape.T == 1) != args.decode:
            raise UserError(f"{shape}: --decode is for T = 1, and T = 1 for --decode")
    try:
        candidates = choose(args.candidates.split(",") if args.candidates else None, decode=args.decode)
    except KeyError as error:
        known = ", ".join(c.name for c in CANDIDATES)
        raise UserError(f"--candidates: {error} is not known", f"choose from {known} and their families") from None
    if not candidates:
        raise UserError(f"--candidates {args.candidates}: none that {'decodes' if args.decode else 'trains'}")
    dtype = args.dtype or ("bf16" if device == "cuda" else "fp32")
    return device, [Stage("decoding" if args.decode else "sequences", shapes, dtype, candidates)]


def _machine(device: str) -> dict:
    """Return what a reader of the JSON must know about the machine."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "fla-core"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    if device == "cuda":
        processor = {"device": torch.cuda.get_device_name(), "capability": list(torch.cuda.get_device_capability())}
    else:
        threads = torch.get_num_threads()
        processor = {"device": f"{_processor()}, threads: {threads}", "threads": threads}
    return {**processor, "versions": versions, "date": datetime.now(UTC).isoformat(timespec="seconds")}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


HEADS = ["", "forward ms", "of bound", "MiB", "fwd+bwd ms", "of bound", "MiB", "error y", "state", "gradient", ""]


def _table(problem: dict) -> Iterator[str]:
    """Yield lines: aligned columns of what ran, then what did not run and why."""
    ran = [result for result in problem["results"] if "not_run" not in result]
    rows = [HEADS, *(_row(result) for result in ran)]
    used = [i for i in range(len(HEADS)) if any(row[i] not in ("", "-") for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in used}
    for row in rows if ran else ():
        cells = (row[i].ljust(widths[i]) if i in (0, len(HEADS) - 1) else row[i].rjust(widths[i]) for i in used)
        yield "  ".join(cells).rstrip()
    missing: dict[str, list[str]] = {}
    for result in problem["results"]:
        if "not_run" in result:
            missing.setdefault(result["not_run"], []).append(result["candidate"])
    for why, names in missing.items():
        yield f"{', '.join(names)}: not run: {why}"
    tokens = {result["error"]["tokens"] for result in ran if "tokens" in result.get("error", ())}
    if tokens:
        yield f"errors: relative L2 against fp64 at T = {tokens.pop()}"


def _row(result: dict) -> list[str]:
    cells, notes = [result["candidate"]], []
    for which, label in (("forward", "forward"), ("forward_backward", "fwd+bwd")):
        timing = result.get(which, {})
        if "ms" not in timing:
            cells += ["-", "-", "-"]
            notes += [f"{label} not run: {timing['not_run']}"] if timing else []
            continue
        share, extra = timing["of_bound"], timing["extra_bytes"]
        cells += [
            f"{timing['ms']:,.0f}" if timing["ms"] >= 1000 else f"{timing['ms']:.3g}",
            "-" if share is None else f"{share:.1%}",
        ]
        cells += ["-" if extra is None else f"{extra / 2**20:.1f}"]
        notes += [f"{label} {timing['setting']}"] if timing["setting"] else []
        if timing["repeats"] < timing["asked"]:
            notes += [
                f"{label}: {timing['repeats']} of {timing['asked']} repeats" if timing["repeats"] else f"{label}: once"
            ]
    error = result.get("error", {})
    cells += [f"{error[name]:.1e}" if name in error else "-" for name in ("y", "state")]
    cells += [f"{error['gradient']:.1e} ({error['worst']})" if "worst" in error else "-"]
    notes += [f"errors not known: {error['not_run']}"] if "not_run" in error else []
    return [*cells, "; ".join(notes)]
