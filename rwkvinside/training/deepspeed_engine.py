"""Training steps over several processes, with DeepSpeed.

No other file imports DeepSpeed; training in one process is in `local_engine`. Both give the same numbers for the same
rows, whatever the number of ranks and micro-batches, and both hand out weights and optimizer state as full fp32 tensors
by name, so that a checkpoint does not depend on how it was trained.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from datetime import timedelta
from functools import partial
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..support.extras import import_extra
from .batching import StepShape
from .cuda_graphs import Sums
from .deepspeed_config import deepspeed_config, offloads
from .local_engine import LocalEngine, MetricSums
from .optimizer import (
    MOMENTS,
    Groups,
    build_optimizer,
    check_names,
    check_state,
    fresh_state,
    load_plain_state,
    plain_state,
    set_rates,
    trainable,
)
from .precision import check_precision, precision_context
from .process_group import Distributed
from .protocols import AnyBatch, Step, StepResult
from .settings import DeepSpeedConfig, OptimConfig


class DeepSpeedEngine:
    """Several processes, one device each, with ZeRO stages 0 to 3.

    Has the interface of `LocalEngine`. All methods but `set_rates` must be called on every rank. ZeRO 3 leaves the
    model in shards: it can be used through `module` only, and not be wrapped again.

    Args:
        model: on the CPU.
        groups: {learning-rate group: {name: parameter}} of everything that trains.
        settings: of AdamW and clipping.
        world: from `join_process_group`.
        precision: "fp32" or "bf16".
        zero: sharding, offloading, and the user's own DeepSpeed configuration. Its bf16 weights (`bf16_weights`) are
            rounded ones in the forward; what was fp32 before keeps its full precision in the masters.
        shape: how the rows of a step are cut; None: one micro-batch a step of one row.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Groups,
        settings: OptimConfig,
        world: Distributed,
        precision: str = "fp32",
        zero: DeepSpeedConfig | None = None,
        shape: StepShape | None = None,
    ):
        check_precision(precision)
        self.world = world
        self.model = model
        self.trainable = trainable(groups)
        self.precision = precision
        self._groups = groups
        config = deepspeed_config(zero or DeepSpeedConfig(), settings, precision, shape or StepShape(1, 1, world.size))
        self.zero_stage = config["zero_optimization"]["stage"]
        self._rounded = "bf16" in config
        self._offloaded = offloads(config["zero_optimization"], "offload_optimizer")
        # DeepSpeed makes its masters from the already rounded weights
        exact = {n: p.detach().to("cpu", copy=True) for n, p in self.trainable.items()} if self._rounded else {}
        if not self._rounded:
            for parameter in self.trainable.values():
                parameter.data = parameter.data.float()
        self._optimizer = build_optimizer(groups, settings)  # sees shapes, which shards have not
        self._used: set[str] = set()
        self._hooks = [p.register_hook(partial(self._use, name)) for name, p in self.trainable.items()]
        if self.zero_stage == 3:
            _shard(model, config, world, self._rounded)
            self._hooks.append(model.register_forward_hook(_as_items))
        self.module, self._wrapped = _initialize(model, config, list(self.trainable.values()), self._optimizer)
        if self.zero_stage == 3:
            self._hooks.append(model.register_forward_hook(_as_mapping))
        if not self._plain:
            self._make_state()
        if exact:
            self.load_parameters(exact)

    def set_rates(self, rates: Mapping[str, float]) -> None:
        """Set the learning rate per group for the next step."""
        set_rates(self._optimizer, rates)

    def train_step(self, micro_batches: Sequence[AnyBatch], step: Step[AnyBatch], denominator: int) -> StepResult:
        """Make a step like `LocalEngine.train_step`.

        Every rank brings equally many micro-batches.
        """
        loss, metrics, losses = self._accumulate(micro_batches, step, denominator).reduce(self.world, denominator)
        if not math.isfinite(loss):
            return StepResult(loss, metrics, math.nan, losses)
        if self._plain:  # reports no norm; the gradients are averaged by now and not yet clipped
            norm = nn.utils.get_total_norm([p.grad for p in self.trainable.values() if p.grad is not None])
            if not math.isfinite(norm):
                return StepResult(loss, metrics, float(norm), losses)
            self.module.step()
        else:
            self._clear_unused()
            self.module.step()  # leaves the weights alone where the norm is not finite
            norm = self.module.get_global_grad_norm()
        return StepResult(loss, metrics, float(norm), losses)

    def backward(self, micro_batch: AnyBatch, step: Step[AnyBatch]) -> None:
        """Run one micro-batch forward and backward, without an update.

        Hooks can look at it.
        """
        self._accumulate([micro_batch], step, 1)

    def full_parameters(self) -> dict[str, Tensor]:
        """Return what `LocalEngine.full_parameters` does, on rank 0.

        Empty on the others.
        """
        return self._gather({name: (p, None) for name, p in self.trainable.items()})

    @torch.no_grad()
    def load_parameters(self, tensors: Mapping[str, Tensor], absent: Collection[str] = ()) -> None:
        """Set the weights of the forward, and the masters.

        Arguments and errors are those of `LocalEngine.load_parameters`.
        """
        import deepspeed

        check_names("weights", set(tensors), set(self.trainable) - set(absent))
        for name, parameter in self._but(absent).items():
            if self.zero_stage == 3:
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    if self.world.is_main:
                        parameter.copy_(tensors[name])
            else:
                parameter.copy_(tensors[name])
            if not self._plain:
                self._set_full(parameter, tensors[name], None)

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return what `LocalEngine.optimizer_state` does, on rank 0.

        Empty on the others.
        """
        if self._plain:
            return plain_state(self._optimizer, self.trainable) if self.world.is_main else {}
        state = self._gather({f"{n}/{m}": (p, m) for n, p in self.trainable.items() for m in MOMENTS})
        if state:
            for names, flat_state in self._flat_states():
                state |= {
                    f"{name}/step": flat_state["step"].detach().to("cpu", torch.int64, copy=True) for name in names
                }
        return state

    def load_optimizer_state(self, state: Mapping[str, Tensor], absent: Collection[str] = ()) -> None:
        """Set what `optimizer_state` returned.

        Every rank gets the full state and keeps its part.
        """
        present = self._but(absent)
        if self._plain:
            load_plain_state(self._optimizer, present, state)
            return
        check_state(state, present)
        for names, flat_state in self._flat_states():
            steps = {int(state.get(f"{name}/step", 0)) for name in names}  # a group joins the training as a whole
            if len(steps) > 1:
                raise UserError(
                    f"parameters trained together have made {', '.join(map(str, sorted(steps)))} updates",
                    "under DeepSpeed resume with the `unfreeze` and `optim.rates` that the checkpoint was made with",
                )
            flat_state["step"].fill_(*steps)
        for name, parameter in present.items():
            for moment in MOMENTS:
                self._set_full(parameter, state[f"{name}/{moment}"], moment)

    def autocast(self) -> AbstractContextManager:
        """Return the context in which steps run.

        Rounded weights need none, and copies of whole weights would undo ZeRO 3.
        """
        if self._rounded:
            return nullcontext()
        return precision_context(self.precision, self.world.device, cache=self.zero_stage < 3)

    def close(self) -> None:
        """Remove DeepSpeed's hooks from the model, so that it can be wrapped again.

        Not a collective call. After ZeRO 3 the model is left in shards, after `bf16_weights` with rounded ones: the
        next stage starts from the checkpoint, not from them. What DeepSpeed holds is in cycles: memory is free after
        `gc.collect()`.
        """
        self.module.destroy()
        _release(self.model)
        for hook in self._hooks:
            hook.remove()

    @property
    def _plain(self) -> bool:
        """Whether the optimizer is torch's own and holds the parameters.

        It is so for ZeRO 0 in fp32; the safe_* accessors do not work then.
        """
        return self._wrapped is self._optimizer

    def _use(self, name: str, gradient: Tensor) -> None:
        self._used.add(name)

    def _clear_unused(self) -> None:
        """Clear the gradients of parameters that this step did not use.

        DeepSpeed's buffers still hold the last gradient there was.
        """
        from deepspeed import utils

        for name, parameter in self.trainable.items():
            if name not in self._used and self.zero_stage == 3:
                utils.safe_set_local_grad(parameter, torch.zeros_like(_shard_of(parameter)))
            elif name not in self._used and self._offloaded:
                utils.safe_set_full_grad(parameter, torch.zeros_like(parameter))
        self._used.clear()

    def _but(self, absent: Collection[str]) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.trainable.items() if name not in absent}

    def _accumulate(self, micro_batches: Sequence[AnyBatch], step: Step[AnyBatch], denominator: int) -> MetricSums:
        sums = MetricSums()
        for i, batch in enumerate(micro_batches):
            self.module.set_gradient_accumulation_boundary(i == len(micro_batches) - 1)
            with self.autocast():
                loss, metrics = step(self.module, batch)
            # DeepSpeed averages gradients over the ranks, the loss needs their sum
            self.module.backward(loss * (self.world.size / denominator), scale_wrt_gas=False)
            sums.add(Sums.of(loss, metrics))
        return sums

    def _flats(self) -> Iterator[tuple[str, Tensor]]:
        """Yield this rank's flat fp32 partitions with their learning-rate groups."""
        if self.zero_stage == 3:
            for i, flat in enumerate(self._wrapped.fp32_partitioned_groups_flat):
                yield self._optimizer.param_groups[self._wrapped.sub_group_to_group_id[i]]["group"], flat
        else:
            for group in self._optimizer.param_groups:
                for flat in group["params"]:
                    yield group["group"], flat

    def _flat_states(self) -> Iterator[tuple[list[str], dict[str, Tensor]]]:
        """Yield the optimizer state of this rank's flat partitions.

        Each comes with the names of its learning-rate group.
        """
        for group, flat in self._flats():
            yield list(self._groups[group]), self._optimizer.state[flat]

    def _make_state(self) -> None:
        """Make Adam's state before the first step, linked to the parameters.

        ZeRO 3 has made one empty step already, which shifts the bias correction. ZeRO 1 and 2 link the state after the
        first parameter group's first update, when the other groups have none yet, and never again: their moments could
        not be read.
        """
        for _, flat in self._flats():
            self._optimizer.state[flat] = fresh_state(flat)
        if self.zero_stage < 3:
            self._wrapped._lazy_init_hp_params_optimizer_state()

    def _gather(self, tensors: Mapping[str, tuple[nn.Parameter, str | None]]) -> dict[str, Tensor]:
        """Return full fp32 masters (moment None) or moments by key.

        They are gathered one at a time and kept on rank 0 only.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        gathered = {}
        for key, (parameter, moment) in tensors.items():
            if self._plain:
                full = parameter.detach()
            elif moment is None:
                full = safe_get_full_fp32_param(parameter)
            else:
                full = safe_get_full_optimizer_state(parameter, moment)
            if self.world.is_main:
                gathered[key] = full.to("cpu", torch.float32)
        return gathered

    def _set_full(self, parameter: nn.Parameter, full: Tensor, moment: str | None) -> None:
        """Set this rank's part of a master (moment None) or of a moment."""
        from deepspeed import utils

        full = full.float()
        if self.zero_stage == 3:  # the setters of full tensors do not know the padding of the last rank's part
            size = _shard_of(parameter).numel()
            shard = torch.zeros(size)
            values = full.flatten()[self.world.rank * size : (self.world.rank + 1) * size]
            shard[: values.numel()] = values
            if moment is None:
                utils.safe_set_local_fp32_param(parameter, shard)
            else:
                utils.safe_set_local_optimizer_state(parameter, shard, moment)
        elif moment is None:
            utils.safe_set_full_fp32_param(parameter, full)
        else:
            utils.safe_set_full_optimizer_state(parameter, full, moment)


Engine = LocalEngine | DeepSpeedEngine


def inference_engine(
    model: nn.Module, shared: Sequence[nn.Parameter], world: Distributed, config: Mapping | None = None
) -> tuple[nn.Module, Callable[[], AbstractContextManager], Callable[[], None]]:
    """Shard a frozen model over the ranks (ZeRO 3).

    Args:
        model: without gradients, on the CPU; its parameters are moved one at a time.
        shared: parameters that are also used outside of the model's forward.
        world: the processes.
        config: sections of DeepSpeed's configuration, for instance offloading.

    Returns:
        What to call in place of the model, on every rank equally often; a context in which `shared` are whole, which is
        collective too; and what to call when the model is not needed any more.
    """
    import deepspeed

    zero = DeepSpeedConfig(zero_stage=3, config=config)
    full = deepspeed_config(zero, OptimConfig(), "fp32", StepShape(1, 1, world.size))
    _shard(model, full, world, rounded=False)
    engine, _ = _initialize(model, full)
    _release(model)

    def close() -> None:
        engine.destroy()
        _release(model)

    return engine, lambda: deepspeed.zero.GatheredParameters(list(shared)), close


def join_process_group() -> Distributed:
    """Join the processes that `deepspeed` or `torchrun` started.

    Each takes the device of its local rank. The launcher's variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
    MASTER_PORT) must be set.
    """
    import_extra("deepspeed", "training under a launcher", "or start one process with python")
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # compiles for a minute and serves inference only
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # the others wait while rank 0 reads and tokenizes
    deepspeed.init_distributed(timeout=timedelta(hours=4), verbose=False)
    accelerator.set_device(deepspeed.comm.get_local_rank())
    # torch's own would leave what DeepSpeed keeps of the group
    return Distributed(accelerator.current_device_name(), leave=deepspeed.comm.destroy_process_group)


def _initialize(
    model: nn.Module,
    config: dict,
    parameters: list[nn.Parameter] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> tuple[Any, Any]:
    """Return DeepSpeed's engine and its optimizer.

    Raises:
        UserError: DeepSpeed refuses the configuration.
    """
    import deepspeed

    try:
        with redirect_stdout(StringIO()):  # its bf16 optimizer prints memory figures, not to be switched off
            engine, wrapped, _, _ = deepspeed.initialize(
                model=model, model_parameters=parameters, optimizer=optimizer, config=config
            )
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"DeepSpeed refuses its configuration: {reason}", "correct deepspeed.config") from error
    return engine, wrapped


def _shard_of(parameter: nn.Parameter) -> Tensor:
    return getattr(parameter, "ds_tensor")  # noqa: B009 - DeepSpeed's, which torch's types do not know


def _shard(model: nn.Module, config: dict, world: Distributed, rounded: bool) -> None:
    """Cut the parameters of a model on the CPU into shards.

    This is done one parameter at a time, so that no device ever holds all; buffers are moved whole.
    """
    import deepspeed

    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(world.device)
    if rounded:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.bfloat16()
    deepspeed.zero.Init(module=model, config_dict_or_path=config)


def _release(model: nn.Module) -> None:
    """Let a model go that DeepSpeed has sharded.

    DeepSpeed leaves what it shards on a stack of modules (the root, and what was recomputed in part only) and in a
    cache, for ever: this takes the model off the stack, and empties the cache, which fills again.
    """
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    stack, modules = parameter_offload.FWD_MODULE_STACK, set(model.modules())
    stack[:] = [module for module in stack if module not in modules]
    for cell in vars(Coordinator)["_PartitionedParameterCoordinator__params_to_release"].__closure__ or ():
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()


class _Items(list):
    """The items of a dictionary on its way through DeepSpeed's hooks.

    They take a dictionary's keys for names of attributes.
    """


def _as_items(module: nn.Module, args: tuple, output: Any) -> Any:
    return _Items(output.items()) if isinstance(output, dict) else output


def _as_mapping(module: nn.Module, args: tuple, output: Any) -> Any:
    return dict(output) if isinstance(output, _Items) else output
