"""`rwkvinside doctor`: devices, memory, and whether the installed packages are those that this version needs."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from typing import TYPE_CHECKING

from ..support.text import rounded_bytes
from .arguments import ArgumentParser

if TYPE_CHECKING:
    from packaging.requirements import Requirement

MISSING = "missing"
FOR_DEVELOPERS = ("dev", "docs")


def main(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Print the findings; return 2 if a required package is missing or does not fit."""
    parser.parse(argv)
    packages, problems = _packages()
    verdict = "all requirements are met"
    if problems:
        verdict = f"{len(problems)} requirements are not met: pip install {' '.join(problems)}"
    print(*_machine(), *_kernels(), *packages, verdict, sep="\n")
    return 2 if problems else 0


def _machine() -> list[str]:
    """Return lines on Python, processor, memory, disk, GPUs and where training runs."""
    import psutil
    import torch

    memory, disk = psutil.virtual_memory(), shutil.disk_usage(".")
    lines = [
        f"python {platform.python_version()} on {platform.platform()}",
        f"{psutil.cpu_count(logical=False)} cores, threads of torch: {torch.get_num_threads()}",
        f"memory {rounded_bytes(memory.available)} of {rounded_bytes(memory.total)} free",
        f"disk here {rounded_bytes(disk.free)} of {rounded_bytes(disk.total)} free",
    ]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        lines.append(f"cuda:{i} {properties.name}, {rounded_bytes(properties.total_memory)}")
    if torch.cuda.is_available():
        lines.append(f"training runs on cuda in {'bf16' if torch.cuda.is_bf16_supported() else 'fp32'}")
    elif torch.backends.mps.is_available():
        lines.append(
            "training runs on the CPU in fp32: Apple's GPUs are not used, the recurrence has no kernel for them"
        )
    else:
        lines.append("training runs on the CPU in fp32: PyTorch finds no CUDA device")
    return lines


def _kernels() -> list[str]:
    """Return a line for each kind of device in this machine: what runs WKV-7 on it."""
    import torch

    from .. import kernels

    lines = []
    for device, backend in [("CPU", "native")] + ([("GPU", "triton")] if torch.cuda.is_available() else []):
        if reason := kernels.why_unavailable(backend):
            kernel = f"chunked PyTorch, several times slower than the {backend} kernel: {reason}"
        else:
            kernel = f"the {backend} kernel" + (f" with {kernels.instructions()} code" if backend == "native" else "")
        lines.append(f"WKV-7 on the {device}: {kernel}")
    return lines


def _packages() -> tuple[list[str], list[str]]:
    """Return a line for each package, and what pip has to install of the required ones, quoted for a shell."""
    lines, problems = [], []
    for requirement in _requirements():
        installed, fits = _installed(requirement)
        if not fits:
            problems.append(f"'{requirement.name}{requirement.specifier}'")
        lines.append(
            f"{'ok ' if fits else 'BAD'} {requirement.name} {installed} (needs {requirement.specifier or 'any'})"
        )
    extras = metadata("rwkvinside").get_all("Provides-Extra") or []
    for extra in (name for name in extras if name not in FOR_DEVELOPERS):
        for requirement in _requirements(extra):
            installed, fits = _installed(requirement)
            state = "ok " if fits else "-  " if installed == MISSING else "BAD"
            lines.append(f"{state} {requirement.name} {installed} (extra {extra})")
    return lines, problems


def _requirements(extra: str = "") -> list[Requirement]:
    """Return the requirements of this package, or those that an extra adds."""
    from packaging.requirements import Requirement

    requirements = []
    for requirement in map(Requirement, requires("rwkvinside") or ()):
        marker = requirement.marker
        base = marker is None or marker.evaluate({"extra": ""})
        if base == (not extra) and (marker is None or marker.evaluate({"extra": extra})):
            requirements.append(requirement)
    return requirements


def _installed(requirement: Requirement) -> tuple[str, bool]:
    """Return the installed version, and whether it fits."""
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        return MISSING, False
    return installed, requirement.specifier.contains(installed, prereleases=True)
