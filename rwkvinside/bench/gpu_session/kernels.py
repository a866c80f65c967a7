"""How fast are the kernels? Every launch and the whole next to the time that their bytes take, then configurations."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...kernels.bench.measure import copy_bandwidth
from ...kernels.bench.problem import Shape, ideal_bytes
from ...kernels.gpu import table
from ...kernels.gpu.decode import plan_step
from ...kernels.gpu.launch import Launch, capability
from ...modeling.wkv7 import wkv7
from . import windows
from .compiling import Compiler
from .configurations import Batch, Fastest, of_part, rounds
from .mixer_times import MixerCase, mixer_times, moved
from .mixer_times import cases as mixer_cases
from .timing import host_microseconds, launch_milliseconds, milliseconds
from .wkv_cases import Capability, Case

if TYPE_CHECKING:
    from .stage import Stage

WINNERS = "configurations.json"


def run(stage: Stage) -> None:
    """Time the shapes, the mixer, windows, decoding, then configurations, each as soon as it is compiled.

    Windows are checked before; the fastest configurations are written.
    """
    device = stage.device
    cuda = device == "cuda"
    found = capability(torch.device(device))
    processors = torch.cuda.get_device_properties(0).multi_processor_count if cuda else 0
    bandwidth = copy_bandwidth(device)
    stage.record("copy", bytes_per_s=bandwidth)
    compiler = Compiler(stage)

    def time_all(cases: list[Case]) -> None:
        compiler.ahead(", ".join(case.name for case in cases), [x for case in cases for x in launched(case)])
        for case in cases:
            needs = 3 + compiler.seconds(launched(case))
            stage.attempt(f"time {case.name}", partial(times, case, device, bandwidth, processors), needs)

    def launched(case: Case) -> list[Launch]:
        planned = case.as_called(found, processors) if as_called(case) else case
        passes = planned.plan(case.placeholders(), found).launches
        return [*passes, *(planned.inference(found) if as_called(case) else [])]

    def time_mixer(case: MixerCase) -> None:
        launches = list(case.launches("meta").values())
        compiler.ahead(case.name, launches)
        needs = 1 + 0.1 * len(launches) + compiler.seconds(launches)
        stage.attempt(case.name, partial(mixer_times, case, device, bandwidth), needs)

    first, *others = timed_cases(stage.dry)
    time_all(first)
    for case in mixer_cases(stage.dry):
        time_mixer(case)
    windows.run(stage, compiler, bandwidth)
    for rows in (1,) if stage.dry else (1, 8, 64, 512):
        stage.attempt(f"decode {rows}", partial(decode_times, rows, device, bandwidth, stage.dry))
    fastest = Fastest()

    def try_out(batch: Batch) -> None:
        parts = list(_parts(batch, found))
        compiler.ahead(batch.name, parts)
        needs = 1 + 0.4 * len(parts) + compiler.seconds(parts)
        stage.attempt(f"configurations {batch.name}", partial(compare, batch, device, found, fastest), needs)
        if winners := fastest.table():
            table.write(stage.directory / WINNERS, winners)

    promising, *more = rounds(stage.dry)
    for batch in promising:
        try_out(batch)
    for cases in others:
        time_all(cases)
    for batch in chain.from_iterable(more):
        try_out(batch)


def timed_cases(dry: bool) -> list[list[Case]]:
    """Return the cases that are timed, the most important first, in groups that are compiled together."""
    if dry:
        return [[Case(1, 64, 2, 16)]]
    return [
        [
            *(Case(8, 4096, 64, 64), Case(8, 4096, 32, 128), Case(32, 512, 16, 128), Case(4, 4096, 16, 128, groups=8)),
            *(Case(1, 4096, 32, 64), Case(1, 4096, 32, 64, block_v=16, segments=4)),
        ],
        [
            *(Case(8, 4096, 64, 64, "fast"), Case(8, 4096, 64, 64, "high"), Case(8, 4096, 64, 64, "fp32")),
            *(Case(8, 4096, 16, 256), Case(8, 4096, 32, 128, "fp32")),
        ],
    ]


def as_called(case: Case) -> bool:
    """Return whether a case leaves to `wkv7` how it is computed."""
    return (case.block_v, case.segments, case.config) == (None, 1, None)


def _parts(batch: Batch, found: Capability) -> Iterable[Launch]:
    """Yield the launches of a batch's part, without memory."""
    for _, case in batch.configured(found):
        yield from of_part(batch.part, case.plan(case.placeholders(), found).launches)


def times(case: Case, device: str, bandwidth: float, processors: int) -> dict:
    """Time every launch of a case, and both passes as a user calls them where `wkv7` decides about the launches.

    Args:
        case: to compute.
        device: "cuda" or "cpu".
        bandwidth: bytes per second of a copy, for the time that the bytes take.
        processors: multiprocessors of the GPU.
    """
    inputs = case.inputs(device)
    found = capability(inputs[0].device)
    planned = case.as_called(found, processors) if as_called(case) else case
    moves = ideal_bytes(Shape(case.batch, case.time, case.heads, case.size), case.dtype, "forward_backward")
    return {
        **launch_times(planned, inputs, bandwidth),
        "block_v": planned.block_v,
        "segments": planned.segments,
        "ideal_ms": 1e3 * moves / bandwidth,
        **(passes(case, inputs) if as_called(case) else {}),
    }


def launch_times(case: Case, inputs: list[Tensor], bandwidth: float) -> dict:
    """Time every launch of a case by itself, and all of them one after another."""
    device = inputs[0].device.type
    plan = case.plan(inputs, capability(inputs[0].device))

    def everything() -> None:
        for launch in plan.launches:
            launch.run()

    everything()  # so that no launch reads what none has written
    launches: dict[str, dict[str, float]] = {}
    for place, part in (("forward", plan.forward), ("backward", plan.backward)):
        for launch in part:
            name = f"{place} {launch.kernel.__name__}" + (" affine" if launch.constants.get("AFFINE") else "")
            row = launches.setdefault(name, {"ms": 0.0, "floor_ms": 0.0, "bytes": 0})  # segments have several of a kind
            row["ms"] += launch_milliseconds(launch.run, device, 10)
            row["floor_ms"] += 1e3 * moved(launch) / bandwidth
            row["bytes"] += moved(launch)
    return {"launches": launches, "launched_ms": launch_milliseconds(everything, device)}


def passes(case: Case, inputs: list[Tensor]) -> dict:
    """Time forward, and forward with backward, as a user calls them."""
    device = inputs[0].device.type
    leaves = [x.detach().requires_grad_() for x in inputs]

    def forward() -> object:
        with torch.no_grad():
            return wkv7(*inputs, backend="triton", precision=case.precision)

    def both_passes() -> object:
        y, _ = wkv7(*leaves, backend="triton", precision=case.precision)
        return torch.autograd.grad(y, leaves, y)

    result = {"forward_ms": milliseconds(forward, device), "forward_backward_ms": milliseconds(both_passes, device)}
    result["host_us"] = host_microseconds(both_passes, device)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both_passes()
        result["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return result


def compare(batch: Batch, device: str, found: Capability, fastest: Fastest) -> dict:
    """Time a part of the kernels with every configuration of a batch."""
    inputs = batch.case.inputs(device)
    timed, failed = [], []
    architecture = 10 * found[0] + found[1] if found else 80
    for words, case in batch.configured(found):
        assert case.config is not None
        try:
            parts: dict[str, float] = {}
            for launch in of_part(batch.part, case.plan(inputs, found).launches):
                name = launch.kernel.__name__
                parts[name] = parts.get(name, 0.0) + launch_milliseconds(launch.run, device, 5)
        except Exception as error:  # shared memory or registers that this GPU lacks
            failed.append(f"{words}: {type(error).__name__}: {(str(error).strip() or '?').splitlines()[0][:100]}")
            continue
        ms = sum(parts.values())
        timed.append({"ms": ms, "with": words, **parts})
        fastest.add((architecture, case.padded, case.precision), batch.part, case.config, ms)
    timed.sort(key=lambda row: row["ms"])
    best = {name: timed[0][name] for name in ("ms", "with")} if timed else {}
    return {**best, "fastest": timed, "failed": failed}


def decode_times(rows: int, device: str, bandwidth: float, dry: bool) -> dict:
    """Time one token of 32 heads of 64: as a user calls it, and as a CUDA graph."""
    heads, size = (2, 16) if dry else (32, 64)
    inputs = Case(rows, 1, heads, size).inputs(device)
    state = torch.zeros(rows, heads, size, size, device=device)
    (launch,), _ = plan_step(*(x[:, 0] for x in inputs), state, capability=capability(inputs[0].device))

    def eager() -> None:
        with torch.no_grad():
            wkv7(*inputs, state, backend="triton", inplace=True)

    return {
        "graph_ms": launch_milliseconds(launch.run, device),
        "floor_ms": 1e3 * moved(launch) / bandwidth,
        "eager_ms": milliseconds(eager, device),
        "host_us": host_microseconds(eager, device),
    }
