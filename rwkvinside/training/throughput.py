"""The measured part of a training row: speed and memory of this process."""

from __future__ import annotations

import time

import torch

from ..support.process_memory import peak_bytes


class Throughput:
    """Tokens per second and time to go.

    Counts the steps of this process only: a resumed run starts afresh.
    """

    def __init__(self) -> None:
        self._mark = time.perf_counter()
        self._mean: float | None = None

    def mark(self) -> None:
        """Note that a step begins.

        Time since the last one (evaluation, checkpoint) does not count.
        """
        self._mark = time.perf_counter()

    def step(self, tokens: int, steps_left: int) -> tuple[float, float]:
        """Note that the step that began at `mark` is done.

        Args:
            tokens: of the step.
            steps_left: after it.

        Returns:
            The step's tokens per second, and the estimated seconds for the steps left.
        """
        seconds = max(time.perf_counter() - self._mark, 1e-9)
        self._mean = seconds if self._mean is None else 0.9 * self._mean + 0.1 * seconds
        return tokens / seconds, self._mean * steps_left

    @property
    def seconds_per_step(self) -> float:
        """The mean so far, in which later steps count more; 0 before the first."""
        return self._mean or 0.0


def memory_mb(device: torch.device) -> float:
    """Return the peak memory in MB (1e6 bytes).

    It is that of the CUDA allocator, elsewhere the resident set of this process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return peak_bytes() / 1e6
