"""`rwkvinside doctor`: devices, memory, and whether the installed packages are the ones that this version needs."""

from __future__ import annotations

import platform
import shutil
from importlib.metadata import PackageNotFoundError, requires, version

import psutil
import torch
from packaging.requirements import Requirement

from .. import kernels
from ..support.text import rounded_bytes

MISSING = "missing"
EXTRAS = ("tensorboard", "wandb", "trackio")  # loggers, which nobody has to have


def main() -> int:
    """Print the findings; 2 when something that this package needs is missing or of another version."""
    print(f"python {platform.python_version()} on {platform.platform()}")
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(".")
    print(f"{psutil.cpu_count(logical=False)} cores, torch uses {torch.get_num_threads()} threads")
    print(f"memory {rounded_bytes(memory.available)} of {rounded_bytes(memory.total)} free")
    print(f"disk here {rounded_bytes(disk.free)} of {rounded_bytes(disk.total)} free")
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        print(f"cuda:{i} {properties.name}, {rounded_bytes(properties.total_memory)}")
    if torch.cuda.is_available():
        print(f"training runs on cuda in {'bf16' if torch.cuda.is_bf16_supported() else 'fp32'}")
    else:
        print("training runs on the CPU in fp32: PyTorch finds no CUDA device")

    for device, backend in _backends():
        print(f"WKV-7 on the {device}: {_kernel(backend)}")

    problems = 0
    for requirement in _requirements():
        found, good = _installed(requirement)
        problems += not good
        print(f"{'ok ' if good else 'BAD'} {requirement.name} {found} (needs {requirement.specifier})")
    for extra in EXTRAS:
        for requirement in _requirements(extra):
            found, good = _installed(requirement)
            state = "ok " if good else "-  " if found == MISSING else "BAD"
            print(f"{state} {requirement.name} {found} (extra {extra})")
    print("all requirements are met" if not problems else f"{problems} requirements are not met: pip install -e .")
    return 2 if problems else 0


def _requirements(extra: str = "") -> list[Requirement]:
    """What this package needs here; of an extra, what it adds."""
    found = []
    for requirement in map(Requirement, requires("rwkvinside") or ()):
        marker = requirement.marker
        base = marker is None or marker.evaluate({"extra": ""})
        if base == (not extra) and (marker is None or marker.evaluate({"extra": extra})):
            found.append(requirement)
    return found


def _installed(requirement: Requirement) -> tuple[str, bool]:
    """The version that is there, and whether it is the one that is needed."""
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return MISSING, False
    return found, requirement.specifier.contains(found, prereleases=True)


def _backends() -> list[tuple[str, str]]:
    return [("CPU", "native")] + ([("GPU", "triton")] if torch.cuda.is_available() else [])


def _kernel(backend: str) -> str:
    if reason := kernels.why_unavailable(backend):
        return f"chunked PyTorch, several times slower than the {backend} kernel: {reason}"
    return f"the {backend} kernel" + (f" with {kernels.instructions()} code" if backend == "native" else "")
