"""The processes of a run: who am I, where do I compute, sums and barriers over all of them.

Lives as long as the program; engines come and go with the stages. `engine.join_process_group` makes it for several.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist


class Distributed:
    """A single process without a process group, or one rank of an initialized `torch.distributed` group.

    Args:
        device: where this process computes.
        leave: leaves the initialized process group, of which this process is a rank; None: it is alone.
    """

    def __init__(self, device: torch.device | str, leave: Callable[[], None] | None = None):
        self.device = torch.device(device)
        self._leave = leave
        self.launched = distributed = leave is not None
        self.rank = dist.get_rank() if distributed else 0
        self.size = dist.get_world_size() if distributed else 1

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and talks."""
        return self.rank == 0

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Sum over ranks, in float64; every rank must call it with as many values and gets the same result."""
        if self._leave is None:
            return [float(v) for v in values]
        device = self.device if dist.get_backend() == "nccl" else "cpu"
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: float) -> list[float]:
        """The value of every rank, in their order; every rank must call it."""
        return self.all_reduce_sum([value if rank == self.rank else 0.0 for rank in range(self.size)])

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.all_reduce_sum([0.0])

    def close(self) -> None:
        """Leave the process group, once all engines are closed.

        Threads of a group that something still holds abort the process now and then when Python exits.
        """
        if self._leave is not None:
            gc.collect()  # engines are in cycles
            self._leave()
            self._leave = None
