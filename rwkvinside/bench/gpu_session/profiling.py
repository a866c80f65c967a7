"""Where the time of a training step goes, by kind of kernel."""

from __future__ import annotations

from collections.abc import Callable

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

MOST = 25
KINDS = (  # kind, words in a kernel's name; the first that fits
    ("recurrence", ("prepare", "scan_forward", "scan_backward", "gradient", "sum_heads", "advance", "wkv")),
    ("loss", ("compare_rows", "squared_error")),
    ("rotation", ("rotate_heads",)),
    ("windows", ("window_", "add_far_parts")),
    ("attention", ("flash", "fmha", "attention", "sdpa")),
    ("products", ("gemm", "cutlass", "cublas", "nvjet", "matmul", "::mm", "addmm", "splitk")),
    ("optimizer", ("adam", "multi_tensor", "foreach")),
    ("reductions", ("reduce", "softmax", "norm")),
    ("copies", ("memcpy", "memset", "copy", "cat")),
    ("gathers", ("index", "gather", "scatter", "embedding", "sort")),
    ("element by element", ("elementwise", "vectorized")),
)


def kernels_of(function: Callable[[], object], device: str) -> dict:
    """Return the kernels of a function by their time.

    Args:
        function: is called once.
        device: "cuda", or "cpu", where operations count instead of kernels.

    Returns:
        Milliseconds in all, by kind, and [name, milliseconds, calls] of those that take most.
    """
    cuda = device == "cuda"
    activity, own = (ProfilerActivity.CUDA, DeviceType.CUDA) if cuda else (ProfilerActivity.CPU, DeviceType.CPU)
    with profile(activities=[activity], acc_events=True) as profiler:
        function()
    rows = []
    for event in profiler.key_averages():
        if event.device_type != own or getattr(event, "is_user_annotation", False):
            continue
        micros = event.self_device_time_total if cuda else event.self_cpu_time_total
        rows.append((event.key, micros / 1000, event.count))
    if not rows:
        raise RuntimeError("the profiler has seen no kernel")
    rows.sort(key=lambda row: -row[1])
    kinds: dict[str, float] = {}
    for name, ms, _ in rows:
        kinds[_kind(name)] = kinds.get(_kind(name), 0.0) + ms
    total, calls = sum(row[1] for row in rows), sum(row[2] for row in rows)
    by_time = dict(sorted(kinds.items(), key=lambda item: -item[1]))
    top = [[name[:120], ms, count] for name, ms, count in rows[:MOST]]
    return {"kernels_ms": total, "launches": calls, **by_time, "top": top}


def _kind(name: str) -> str:
    lower = name.lower()
    return next((kind for kind, words in KINDS if any(word in lower for word in words)), "other")
