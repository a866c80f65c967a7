"""Micro-batches as CUDA graphs: forward and backward are recorded once for each shape, then launched at once.

A small model spends more time on launching kernels from Python than on the kernels. What a graph does is fixed when it
is recorded: addresses, shapes, and every number that Python saw. So micro-batches are copied into memory that stays, in
their `fixed` form, gradients add up in memory that stays, and the divisor of the loss is a tensor.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from ..errors import UserError
from .protocols import AnyBatch, Step

WARM_RUNS = 2  # of a shape before it is recorded, so that every kernel is compiled and every library has its memory
MOST = 8  # graphs at a time; they share their memory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sums:
    """Loss and metric sums of a micro-batch.

    Attributes:
        row: fp32, the loss and then the metrics one after the other.
        shapes: of the metrics by name, in their order.
    """

    row: Tensor
    shapes: Mapping[str, torch.Size]

    @classmethod
    def of(cls, loss: Tensor, metrics: Mapping[str, Tensor]) -> Sums:
        """Return the sums of a step."""
        shapes = {name: metrics[name].shape for name in sorted(metrics)}
        sums = [loss.detach(), *(metrics[name].detach() for name in shapes)]
        return cls(torch.cat([value.float().reshape(-1) for value in sums]), shapes)


Work = Callable[[], Sums]


class Recorder(Protocol):
    """Makes graphs.

    Attributes:
        required: what cannot be recorded is an error; otherwise it runs without a graph.
    """

    required: bool

    def warm(self, work: Work) -> Sums:
        """Run something where and how it will be recorded."""

    def record(self, work: Work) -> tuple[Callable[[], None], Sums]:
        """Record something, which is not run meanwhile; return what runs it, and where its result then is."""


class CudaRecorder:
    """Makes CUDA graphs that share their memory: one runs at a time, and what it leaves is copied before the next.

    Args:
        device: of the graphs.
        required: see `Recorder`.
    """

    def __init__(self, device: torch.device, required: bool = True):
        self.required = required
        self._stream = torch.cuda.Stream(device)  # one for all: libraries make their handles and memory for each
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def warm(self, work: Work) -> Sums:
        """Run something on the stream that records; its result is ready on the current one."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = work()
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def record(self, work: Work) -> tuple[Callable[[], None], Sums]:
        """Record something, see `Recorder`.

        Raises:
            UserError: it cannot be recorded, or there is no memory for it.
        """
        gc.collect()  # what waits for it would hold memory, and be freed in the middle of the graph
        graph = torch.cuda.CUDAGraph()
        pool = next((other.pool() for other in self._graphs), None)  # PyTorch takes no pool without a living graph
        current = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=self._stream):
                result = work()
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # a recording that fails at its end leaves its own
            why = str(_first(error)).partition("\n")[0]
            raise UserError(
                f"a micro-batch cannot be recorded as a CUDA graph: {why}", "set cuda_graphs of the stage to false"
            ) from error
        self._graphs.add(graph)
        return graph.replay, result


def _first(error: BaseException) -> BaseException:
    """Return what was raised first: PyTorch says of the end of a recording that failed only that it failed."""
    return error if error.__context__ is None else _first(error.__context__)


class MicroBatchGraphs(Generic[AnyBatch]):
    """Runs forward and backward of micro-batches by graphs, one for each `key` of their fixed forms.

    The first runs of a shape are ordinary ones. A batch without a fixed form runs as without graphs, whose memory it
    gets. Parameters and their gradients must stay where they are. What cannot be recorded ends all graphs, or is an
    error, see `Recorder`.

    Args:
        run: forward and backward of a batch by a step, with the gradient of the loss (0-d); gives its sums.
        recorder: makes the graphs.
    """

    def __init__(self, run: Callable[[AnyBatch, Step[AnyBatch], Tensor], Sums], recorder: Recorder):
        self._run, self._recorder = run, recorder
        self._step: Step[AnyBatch] | None = None
        self._made: dict[Hashable, _Graph[AnyBatch]] = {}
        self._refused = False

    def __call__(self, batch: AnyBatch, step: Step[AnyBatch], scale: Tensor) -> Sums:
        """Run a micro-batch; arguments and result are those of `run`."""
        fixed = None if self._refused else batch.fixed()
        if step is not self._step or fixed is None:
            self.release()
            self._step = step
        if fixed is None:
            return self._run(batch, step, scale)
        graph = self._made.pop(fixed.key, None) or _Graph(fixed.twin(), scale.clone())
        self._made[fixed.key] = graph  # behind those that were used before
        for key in list(self._made)[:-MOST]:
            del self._made[key]
        graph.batch.overwrite(fixed)
        graph.scale.copy_(scale)
        work = partial(self._run, graph.batch, step, graph.scale)
        if graph.runs < WARM_RUNS:
            graph.runs += 1
            return self._recorder.warm(work)
        if graph.replay is None:
            self._record(graph, work)
        if graph.replay is None or graph.result is None:
            return self._run(batch, step, scale)
        graph.replay()
        return replace(graph.result, row=graph.result.row.clone())

    def _record(self, graph: _Graph[AnyBatch], work: Work) -> None:
        """Record a graph; where it cannot be and need not be, say why, and end all graphs."""
        try:
            graph.replay, graph.result = self._recorder.record(work)
            return
        except UserError as error:
            if self._recorder.required:
                raise
            why = error.cause  # and nothing else of it: its traceback holds what the failed run has made
        logger.warning("%s; training goes on without graphs", why)
        self._refused = True
        self.release()
        gc.collect()
        torch.cuda.empty_cache()  # without a GPU nothing

    def release(self) -> None:
        """Give the memory of all graphs back."""
        self._made.clear()


@dataclass
class _Graph(Generic[AnyBatch]):
    """A graph, or what is to become one.

    Attributes:
        batch, scale: that it reads.
        runs: before it was recorded.
        replay: runs it; None: it is not recorded.
        result: that a run leaves.
    """

    batch: AnyBatch
    scale: Tensor
    runs: int = 0
    replay: Callable[[], None] | None = None
    result: Sums | None = None
