"""How fast are the kernels? Every launch and the whole next to the time that their bytes take, then configurations."""

from __future__ import annotations

import dataclasses

import torch

from ...kernels.bench.measure import copy_bandwidth
from ...kernels.gpu import table
from ...kernels.gpu.decode import plan_step
from ...kernels.gpu.launch import Launch, capability
from ...modeling.wkv7 import wkv7
from .kernel_times import eager_ms, graph_ms, host_us
from .wkv_cases import PARTS, Case, timed_cases, variants, varied_cases


def run(stage) -> None:
    """Time the shapes, then the configurations, then decoding; write the winners."""
    device = stage.device
    bandwidth = copy_bandwidth(device)
    stage.record("copy", bytes_per_s=bandwidth)
    for case in timed_cases(stage.dry)[:8]:
        stage.attempt(f"time {case.name}", lambda case=case: times(case, device, bandwidth))
    for batch in (1,) if stage.dry else (1, 8, 64, 512):
        stage.attempt(f"decode {batch}", lambda batch=batch: decode_times(batch, device, bandwidth, stage.dry))
    found = capability(torch.device(device, 0) if device == "cuda" else torch.device("cpu"))
    best: dict[table.Key, table.Config] = {}
    for case, part in varied_cases(stage.dry):
        if stage.left() < 5:
            stage.record("left out", case=case.name, part=part)
            continue
        what = f"configurations {part} {case.name}"
        stage.attempt(what, lambda case=case, part=part: compare(case, part, device, found, best))
    for case in timed_cases(stage.dry)[8:]:
        if stage.left() > 8:
            stage.attempt(f"time {case.name}", lambda case=case: times(case, device, bandwidth))
    if best:
        table.write(stage.directory / "configurations.json", best)


def moved(launch: Launch) -> int:
    """Return the bytes of all tensors of a launch, each read or written once."""
    tensors = {x.data_ptr(): x for x in launch.args.values() if isinstance(x, torch.Tensor)}
    return sum(x.nbytes for x in tensors.values())


def times(case: Case, device: str, bandwidth: float) -> dict:
    """Time every launch of a case, forward and both passes as a user calls them, and the host."""
    inputs = case.inputs(device)
    found = capability(inputs[0].device)
    plan = case.plan(inputs, found)
    for launch in (*plan.forward, *plan.backward):
        launch.run()
    launches = {}
    for place, part in (("forward", plan.forward), ("backward", plan.backward)):
        for launch in part:
            name = f"{place} {launch.kernel.__name__}" + (" affine" if launch.constants.get("AFFINE") else "")
            ms, floor = graph_ms(launch.run, device, 10), 1e3 * moved(launch) / bandwidth
            if name in launches:  # segments have several of one kind
                ms, floor = ms + launches[name]["ms"], floor + launches[name]["floor_ms"]
            launches[name] = {"ms": ms, "floor_ms": floor, "bytes": moved(launch)}
    whole = graph_ms(lambda: [launch.run() for launch in (*plan.forward, *plan.backward)], device)
    plan = None  # frees its buffers
    leaves = [x.detach().requires_grad_() for x in inputs]

    def forward():
        with torch.no_grad():
            return wkv7(*inputs, backend="triton", precision=case.precision)

    def both_passes():
        y, _ = wkv7(*leaves, backend="triton", precision=case.precision)
        return torch.autograd.grad(y, leaves, y)

    result = {"launches": launches, "launched_ms": whole}
    result["forward_ms"] = eager_ms(forward, device)
    result["forward_backward_ms"] = eager_ms(both_passes, device)
    result["host_us"] = host_us(both_passes, device)
    tokens = case.batch * case.time * case.heads
    ideal = tokens * case.size * (17 * case.dtype.itemsize + 3 * 4)
    result |= {"ideal_ms": 1e3 * ideal / bandwidth, "bytes_per_token_and_head": ideal / tokens}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both_passes()
        result["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return result


def compare(case: Case, part: str, device: str, found, best: dict) -> dict:
    """Time a part of the kernels with every configuration; keep the fastest in `best`."""
    inputs = case.inputs(device)
    timed, failed = [], []
    for each in variants(case, part, found):
        config = each.config
        assert config is not None
        tuning = getattr(config, part)
        label = f"L={config.length} warps={tuning.num_warps} stages={tuning.num_stages} "
        label += {
            "scan": f"BV={config.block_v}",
            "narrow": "BV=16",
            "prep": f"BK={config.prep_block_k}",
            "grad": f"BV={config.grad_block_v} BK={config.grad_block_k}",
        }[part]
        label += f" registers<={tuning.max_registers}" if tuning.max_registers else ""
        try:
            plan = each.plan(inputs, found)
            parts: dict[str, float] = {}
            for launch in (*plan.forward, *plan.backward):
                name = launch.kernel.__name__
                if name in PARTS[part]:
                    launch.run()
                    parts[name] = parts.get(name, 0.0) + graph_ms(launch.run, device, 5)
            timed.append((sum(parts.values()), label, parts, config))
        except Exception as error:  # shared memory or registers that this GPU lacks
            failed.append(f"{label}: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
    timed.sort(key=lambda row: row[0])
    key = (10 * found[0] + found[1] if found else 80, case.padded, case.precision)
    if timed and part != "prep":  # (the length of chunks belongs to all parts)
        names = {"scan": ("block_v", "scan"), "narrow": ("narrow",), "grad": ("grad", "grad_block_v", "grad_block_k")}
        winner = timed[0][3]
        start = best.get(key, table.lookup(case.padded, found, case.precision))
        best[key] = dataclasses.replace(start, **{name: getattr(winner, name) for name in names[part]})
    return {"fastest": [{"ms": ms, "with": label, **parts} for ms, label, parts, _ in timed], "failed": failed}


def decode_times(batch: int, device: str, bandwidth: float, dry: bool) -> dict:
    """Time one token of 32 heads of 64: as a user calls it, and as a CUDA graph."""
    heads, size = (2, 16) if dry else (32, 64)
    case = Case(batch, 1, heads, size)
    inputs = case.inputs(device)
    state = torch.zeros(batch, heads, size, size, device=device)
    step = [x[:, 0] for x in inputs]
    launches, _ = plan_step(*step, state, capability=capability(inputs[0].device))

    def eager():
        with torch.no_grad():
            wkv7(*inputs, state, backend="triton", inplace=True)

    graph = graph_ms(launches[0].run, device)
    floor = 1e3 * moved(launches[0]) / bandwidth
    return {
        "eager_ms": eager_ms(eager, device),
        "host_us": host_us(eager, device),
        "graph_ms": graph,
        "floor_ms": floor,
    }
