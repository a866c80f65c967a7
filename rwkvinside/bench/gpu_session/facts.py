"""The stage `facts`: which card, which versions, and what the card can do at best."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import torch

from .timing import milliseconds

if TYPE_CHECKING:
    from .stage import Stage

PACKAGES = (
    *("torch", "triton", "transformers", "numpy", "pydantic", "omegaconf", "peft", "accelerate"),
    "flash-linear-attention",
)


def run(stage: Stage) -> None:
    """Record the facts."""
    stage.attempt("versions", _versions)
    stage.attempt("card", lambda: _card(stage.device))
    stage.attempt("driver", _driver)
    stage.attempt("copy", lambda: _copy(stage.device, 2**18 if stage.dry else 2**31))
    stage.attempt("product", lambda: _product(stage.device, 128 if stage.dry else 8192))


def _versions() -> dict:
    versions = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    return versions


def _card(device: str) -> dict:
    if device == "cpu":
        return {"name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    card = torch.cuda.get_device_properties(0)
    return {
        "name": card.name,
        "capability": f"{card.major}.{card.minor}",
        "multiprocessors": card.multi_processor_count,
        "gib": card.total_memory / 2**30,
        "l2_mib": card.L2_cache_size / 2**20,
    }


def _driver() -> dict:
    asked = "driver_version,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"], capture_output=True, text=True, timeout=10
        )
    except FileNotFoundError:
        return {"driver": "no nvidia-smi"}
    return {"driver": answer.stdout.strip() or answer.stderr.strip()}


def _copy(device: str, size: int) -> dict:
    """Measure reading and writing `size` bytes each."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = milliseconds(lambda: target.copy_(source), device, repeats=10)
    return {"bytes": size, "ms": ms, "tb_per_s": 2 * size / ms / 1e9}


def _product(device: str, size: int) -> dict:
    """Measure a bf16 product of random square matrices; constant ones would draw less power and run faster."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    ms = milliseconds(lambda: a @ b, device, repeats=10)
    return {"size": size, "ms": ms, "tflop_per_s": 2 * size**3 / ms / 1e9}
