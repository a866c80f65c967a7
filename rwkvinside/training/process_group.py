"""The processes of a run: ranks, devices, sums and barriers over all of them.

Lives as long as the program; engines come and go with the stages. For several processes
`deepspeed_engine.join_process_group` makes it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UserError

Result = TypeVar("Result")


class Distributed:
    """A single process, or one rank of a `torch.distributed` group.

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
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Return sums over ranks, in float64.

        Every rank must call it with as many values and gets the same result.
        """
        if self._leave is None:
            return [float(v) for v in values]
        device = self.device if dist.get_backend() == "nccl" else "cpu"
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: float) -> list[float]:
        """Return the value of every rank, in their order.

        Every rank must call it.
        """
        return self.all_reduce_sum([value if rank == self.rank else 0.0 for rank in range(self.size)])

    def gather_tensor(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensor of every rank, in their order, on the CPU of rank 0; empty on the others.

        Every rank must call it, with the same shape and dtype.
        """
        if self._leave is None:
            return [tensor.cpu()]
        tensor = tensor.contiguous() if dist.get_backend() == "nccl" else tensor.cpu().contiguous()
        found = [torch.empty_like(tensor) for _ in range(self.size)] if self.is_main else None
        dist.gather(tensor, found)
        return [one.cpu() for one in found or ()]

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.all_reduce_sum([0.0])

    def on_main(self, work: Callable[[], Result]) -> Result | None:
        """Do something on rank 0 while the others wait.

        Every rank must call it.

        Returns:
            What rank 0 has found; None on the others.

        Raises:
            UserError: on all ranks, when rank 0 raises one.
        """
        result, problem = None, None
        if self.is_main:
            try:
                result = work()
            except UserError as error:
                problem = error
        (failed,) = self.all_reduce_sum([problem is not None])
        if failed:
            raise problem or UserError("rank 0 has stopped", "its own message says why")
        return result

    def close(self) -> None:
        """Leave the process group, once all engines are closed.

        Threads of a group that something still holds abort the process now and then when Python exits.
        """
        if self._leave is not None:
            gc.collect()  # engines are in cycles
            self._leave()
            self._leave = None
