"""A kernel launch as a value: what would run can be run, counted, or compiled for a GPU that is not there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from rwkvinside.kernels.gpu.table import Tuning


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel.

    Attributes:
        kernel: the `@triton.jit` function.
        grid: number of programs along each axis.
        args: run-time arguments by name (tensors, numbers, None).
        constants: `tl.constexpr` arguments by name.
        tuning: settings to compile it with.
        contract: whether products and sums may become one operation that rounds once.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    constants: dict[str, Any]
    tuning: Tuning
    contract: bool = True

    @property
    def options(self) -> dict[str, int]:
        """Return what Triton compiles the kernel with."""
        options = {"num_warps": self.tuning.num_warps, "num_stages": self.tuning.num_stages}
        options |= {} if self.contract else {"enable_fp_fusion": False}
        return options | ({"maxnreg": self.tuning.max_registers} if self.tuning.max_registers else {})

    def run(self) -> None:
        """Launch on the current device and stream; an empty grid launches nothing."""
        if 0 not in self.grid:
            self.kernel[self.grid](**self.args, **self.constants, **self.options)

    def compile(self) -> Any:
        """Compile without launching; the tensors may be on the meta device. Return Triton's compiled kernel."""
        return self.kernel.run(grid=self.grid, warmup=True, **self.args, **self.constants, **self.options)


def run(launches: Iterable[Launch], device: torch.device) -> None:
    """Run launches in order on a device, which need not be the current one."""
    with torch.cuda.device(device if device.type == "cuda" else -1):
        for launch in launches:
            launch.run()


def capability(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability of a GPU; None for a CPU (Triton's interpreter)."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None
