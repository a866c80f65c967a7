"""Training in this process alone, and the sums of any engine's step.

Training in several processes is in `deepspeed_engine`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from .cuda_graphs import MicroBatchGraphs, Recorder, Sums
from .optimizer import Groups, build_optimizer, check_names, load_plain_state, plain_state, set_rates, trainable
from .precision import check_precision, precision_context
from .process_group import Distributed
from .protocols import AnyBatch, Step, StepResult
from .settings import OptimConfig


class MetricSums:
    """Loss and metric sums of one step.

    All of them take one transfer and one reduction.
    """

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self._shapes: Mapping[str, torch.Size] = {}

    def add(self, sums: Sums) -> None:
        """Add the sums of a micro-batch."""
        self._shapes = sums.shapes
        self._rows.append(sums.row)

    def reduce(self, world: Distributed, denominator: int) -> tuple[float, dict[str, float | list[float]], list[float]]:
        """Return the sums over micro-batches and ranks, divided.

        Returns:
            Loss, metrics by name (1-d ones as lists), and this rank's loss sum per micro-batch, which is not divided.
        """
        local = torch.stack(self._rows).cpu().double()
        total, *rest = (v / denominator for v in world.all_reduce_sum(local.sum(0).tolist()))
        metrics: dict[str, float | list[float]] = {}
        for name, shape in self._shapes.items():
            values, rest = rest[: shape.numel()], rest[shape.numel() :]
            metrics[name] = values if shape else values[0]
        return total, metrics, local[:, 0].tolist()


class LocalEngine:
    """One process on one CPU or GPU.

    Args:
        model: moved to the device of `world`. Trainable parameters become fp32 masters in place.
        groups: {learning-rate group: {name: parameter}} of everything that trains.
        settings: of AdamW and clipping.
        world: a single process.
        precision: "fp32", or "bf16": forward and loss under `torch.autocast`.
        recorder: makes the graphs by which micro-batches run (`cuda_graphs`); None: they run without.

    Attributes:
        model: the model itself.
        module: what steps call; here the same.
        trainable: the parameters by name.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Groups,
        settings: OptimConfig,
        world: Distributed,
        precision: str = "fp32",
        recorder: Recorder | None = None,
    ):
        check_precision(precision)
        self.world = world
        self.trainable = trainable(groups)
        self.precision = precision
        self._clip = settings.clip
        for parameter in self.trainable.values():
            parameter.data = parameter.data.float()
        self.model = self.module = model.to(world.device)
        self._optimizer = build_optimizer(groups, settings)
        graphs: MicroBatchGraphs[Any] | None = (
            None if recorder is None else MicroBatchGraphs(self._micro_batch, recorder)
        )
        self._graphs = graphs

    def set_rates(self, rates: Mapping[str, float]) -> None:
        """Set the learning rate per group for the next step."""
        set_rates(self._optimizer, rates)

    def train_step(self, micro_batches: Sequence[AnyBatch], step: Step[AnyBatch], denominator: int) -> StepResult:
        """Accumulate over the micro-batches, clip, update.

        Leaves the weights alone where a number is not finite.

        Args:
            micro_batches: at least one, on the engine's device.
            step: the objective.
            denominator: what the loss sum is divided by: the count over all micro-batches and ranks.
        """
        if self._graphs is not None:
            self._make_gradients()  # a graph adds to those that there are
        sums = self._accumulate(micro_batches, step, denominator, self._graphs or self._micro_batch)
        loss, metrics, losses = sums.reduce(self.world, denominator)
        self._make_gradients()  # DeepSpeed updates unused parameters too, so that moments decay alike
        norm = nn.utils.clip_grad_norm_(self.trainable.values(), self._clip or math.inf)
        result = StepResult(loss, metrics, float(norm), losses)
        if result.finite:
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=self._graphs is None)
        return result

    def backward(self, micro_batch: AnyBatch, step: Step[AnyBatch]) -> None:
        """Run one micro-batch forward and backward, without an update.

        Hooks can look at it.
        """
        if self._graphs is not None:
            self._graphs.release()  # what runs by itself needs as much
        self._accumulate([micro_batch], step, 1, self._micro_batch)

    def full_parameters(self) -> dict[str, Tensor]:
        """Return the trainable parameters by name, fp32 on the CPU.

        To be saved before the next step: those that are fp32 on the CPU are not copied.
        """
        return {n: p.detach().to("cpu", torch.float32) for n, p in self.trainable.items()}

    @torch.no_grad()
    def load_parameters(self, tensors: Mapping[str, Tensor], absent: Collection[str] = ()) -> None:
        """Set the trainable parameters.

        Args:
            tensors: by name.
            absent: names that keep what they have; all others must be given, and no more.

        Raises:
            UserError: other names.
        """
        check_names("weights", set(tensors), set(self.trainable) - set(absent))
        for name, tensor in tensors.items():
            self.trainable[name].copy_(tensor)

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return the optimizer's state as named tensors.

        Returns:
            "<name>/exp_avg", "<name>/exp_avg_sq" (fp32, CPU, full shape) and "<name>/step" (0-d int64).
        """
        return plain_state(self._optimizer, self.trainable)

    def load_optimizer_state(self, state: Mapping[str, Tensor], absent: Collection[str] = ()) -> None:
        """Set what `optimizer_state` returned, of any engine and number of ranks.

        `absent` is as for `load_parameters`.
        """
        load_plain_state(self._optimizer, {n: p for n, p in self.trainable.items() if n not in absent}, state)

    def autocast(self) -> AbstractContextManager:
        """Return the context in which steps run, for other calls of `module`."""
        return precision_context(self.precision, self.world.device)

    def close(self) -> None:
        """Release graphs; all else belongs to torch."""
        if self._graphs is not None:
            self._graphs.release()

    def _accumulate(
        self, micro_batches: Sequence[AnyBatch], step: Step[AnyBatch], denominator: int, run: Callable[..., Sums]
    ) -> MetricSums:
        sums, scale = MetricSums(), torch.full((), 1 / denominator, device=self.world.device)
        for batch in micro_batches:
            sums.add(run(batch, step, scale))
        return sums

    def _micro_batch(self, batch: AnyBatch, step: Step[AnyBatch], scale: Tensor) -> Sums:
        """Run forward and backward of a micro-batch.

        Args:
            batch, step: as of `train_step`.
            scale: the gradient of the loss, 0-d.
        """
        with self.autocast():
            loss, metrics = step(self.module, batch)
        loss.backward(scale.to(loss.dtype))
        return Sums.of(loss, metrics)

    def _make_gradients(self) -> None:
        for parameter in self.trainable.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
