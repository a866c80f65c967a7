"""Training steps over several processes with DeepSpeed, which no other file imports; in one process: `in_process`.

Both give the same numbers for the same rows, whatever the number of ranks and micro-batches, and both hand out weights
and optimizer state as full fp32 tensors by name, so that a checkpoint does not depend on how it was trained.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from datetime import timedelta
from io import StringIO

import torch
from torch import Tensor, nn

from ..errors import UserError
from .in_process import InProcessEngine, StepResult, Sums, check_precision
from .optimizer import (
    MOMENTS,
    Groups,
    OptimizerSettings,
    build_optimizer,
    check_names,
    check_state,
    fresh_state,
    load_plain_state,
    plain_state,
    set_rates,
    trainable,
)
from .step import Step, TrainingBatch
from .world import World

# What the recipe decides; two places that know a batch size or an optimizer would sooner or later disagree.
RECIPE_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
    "torch_autocast",
)


class DeepSpeedEngine:
    """Several processes, one device each, with DeepSpeed's ZeRO stages 0, 1 and 2; the interface of `InProcessEngine`.

    `bf16` is DeepSpeed's own: every parameter of the model becomes bf16; the masters, moments and accumulated gradients
    of the trainable ones are fp32. Weights that were fp32 before keep their full precision in the masters.

    Args:
        world: from `launched_world`.
        zero_stage: 0, 1 or 2. bf16 with stage 0 runs as stage 1: DeepSpeed's plain bf16 optimizer starts with an empty
            step, which shifts Adam's bias correction.
        config: more DeepSpeed settings, merged over ours (offload, bucket sizes, ...); not those the recipe decides.

    All methods but `set_rates` must be called on every rank.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Groups,
        settings: OptimizerSettings,
        world: World,
        precision: str = "fp32",
        zero_stage: int = 1,
        config: Mapping | None = None,
    ):
        import deepspeed

        check_precision(precision)
        self.world = world
        self.trainable = trainable(groups)
        self.precision = precision
        stage = max(zero_stage, 1) if precision == "bf16" else zero_stage
        full = deepspeed_config(settings.clip, precision, stage, config)
        self.zero_stage = full["zero_optimization"]["stage"]
        # DeepSpeed makes its masters from the already rounded weights
        exact = {n: p.detach().to("cpu", copy=True) for n, p in self.trainable.items() if precision == "bf16"}
        self._optimizer = build_optimizer(groups, settings)
        with redirect_stdout(StringIO()):  # its bf16 optimizer prints memory figures, not to be switched off
            self.module, self._wrapped, _, _ = deepspeed.initialize(
                model=model, model_parameters=list(self.trainable.values()), optimizer=self._optimizer, config=full
            )
        if not self._plain:
            self._make_state()
        if exact:
            self.load_parameters(exact)

    def set_rates(self, rates: Mapping[str, float]) -> None:
        """Learning rate per group for the next step."""
        set_rates(self._optimizer, rates)

    def train_step(self, micro_batches: Sequence[TrainingBatch], step: Step, denominator: int) -> StepResult:
        """As `InProcessEngine.train_step`; every rank brings equally many micro-batches.

        A loss that is not finite leaves the weights alone; with ZeRO a gradient that is not finite under a finite loss
        is seen only after the update, so the caller must not save after a result that is not `finite`.
        """
        sums = Sums()
        for i, batch in enumerate(micro_batches):
            self.module.set_gradient_accumulation_boundary(i == len(micro_batches) - 1)
            loss, metrics = step(self.module, batch)
            # DeepSpeed averages gradients over the ranks, the sums want the sum
            self.module.backward(loss * (self.world.size / denominator), scale_wrt_gas=False)
            sums.add(loss, metrics)
        loss, metrics, losses = sums.reduce(self.world, denominator)
        if not math.isfinite(loss):
            return StepResult(loss, metrics, math.nan, losses)
        if self._plain:  # reports no norm; the gradients are averaged by now and not yet clipped
            norm = nn.utils.get_total_norm([p.grad for p in self.trainable.values()])
            if not math.isfinite(norm):
                return StepResult(loss, metrics, float(norm), losses)
            self.module.step()
        else:
            self.module.step()
            norm = self.module.get_global_grad_norm()
        return StepResult(loss, metrics, float(norm), losses)

    def full_parameters(self) -> dict[str, Tensor]:
        """As `InProcessEngine.full_parameters`, on rank 0; empty on the others."""
        return self._gather({name: (p, None) for name, p in self.trainable.items()})

    @torch.no_grad()
    def load_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        """Set every trainable parameter, in the weights of the forward and in the masters."""
        from deepspeed.utils import safe_set_full_fp32_param

        check_names("weights", set(tensors), set(self.trainable))
        for name, parameter in self.trainable.items():
            parameter.copy_(tensors[name])
            if not self._plain:
                safe_set_full_fp32_param(parameter, tensors[name].float())

    def optimizer_state(self) -> dict[str, Tensor]:
        """As `InProcessEngine.optimizer_state`, on rank 0; empty on the others."""
        if self._plain:
            return plain_state(self._optimizer, self.trainable) if self.world.is_main else {}
        state = self._gather({f"{n}/{m}": (p, m) for n, p in self.trainable.items() for m in MOMENTS})
        if state:
            state["step"] = self._flat_states()[0]["step"].detach().to("cpu", torch.int64, copy=True)
        return state

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `optimizer_state`: every rank is given the full state and keeps its part."""
        from deepspeed.utils import safe_set_full_optimizer_state

        if self._plain:
            load_plain_state(self._optimizer, self.trainable, state)
            return
        check_state(state, self.trainable)
        for own in self._flat_states():
            own["step"].copy_(state["step"])
        for name, parameter in self.trainable.items():
            for moment in MOMENTS:
                safe_set_full_optimizer_state(parameter, state[f"{name}/{moment}"], moment)

    def close(self) -> None:
        """Remove DeepSpeed's hooks from the model, so that it can be wrapped again. Not a collective call.

        After bf16 the model's weights are rounded ones: the next stage starts from the checkpoint, not from them.
        """
        self.module.destroy()

    @property
    def _plain(self) -> bool:
        """ZeRO 0 in fp32: the optimizer is torch's own and holds the parameters; the safe_* accessors do not work."""
        return self._wrapped is self._optimizer

    def _flat_states(self) -> list[dict[str, Tensor]]:
        """Optimizer state of this rank's flat fp32 partitions, one for each parameter group."""
        return [self._optimizer.state[flat] for group in self._optimizer.param_groups for flat in group["params"]]

    def _make_state(self) -> None:
        """Adam's state, linked to the parameters before the first step.

        DeepSpeed links it after the first parameter group's first update, when the other groups have none yet, and
        never again: their moments could not be read.
        """
        for group in self._optimizer.param_groups:
            for flat in group["params"]:
                if not self._optimizer.state.get(flat):
                    self._optimizer.state[flat] = fresh_state(flat)
        self._wrapped._lazy_init_hp_params_optimizer_state()

    def _gather(self, wanted: Mapping[str, tuple[nn.Parameter, str | None]]) -> dict[str, Tensor]:
        """Full fp32 masters (None) or moments by key; one tensor at a time, kept on rank 0 only."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        tensors = {}
        for key, (parameter, moment) in wanted.items():
            if self._plain:
                full = parameter.detach()
            elif moment is None:
                full = safe_get_full_fp32_param(parameter)
            else:
                full = safe_get_full_optimizer_state(parameter, moment)
            if self.world.is_main:
                tensors[key] = full.to("cpu", torch.float32, copy=True)
        return tensors


Engine = InProcessEngine | DeepSpeedEngine


def launched_world() -> World:
    """Join the processes that `deepspeed` or `torchrun` started; each takes the device of its local rank.

    The launcher's variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) must be set.
    """
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # compiles for a minute and serves inference only
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # the others wait while rank 0 reads and tokenises
    deepspeed.init_distributed(timeout=timedelta(hours=4), verbose=False)
    accelerator.set_device(deepspeed.comm.get_local_rank())
    return World(accelerator.current_device_name(), distributed=True)


def deepspeed_config(clip: float, precision: str, zero_stage: int, config: Mapping | None = None) -> dict:
    """DeepSpeed's configuration, the user's merged over ours.

    Raises:
        UserError: a key that the recipe decides, or a ZeRO stage other than 0, 1, 2.
    """
    user = dict(config or {})
    if taken := sorted(set(user) & set(RECIPE_KEYS)):
        raise UserError(
            f"deepspeed.config sets {', '.join(taken)}",
            "these follow from the recipe: set them in `stages` or `precision`",
        )
    # accumulation is told to DeepSpeed per micro-batch, so the counts here only have to be consistent
    ours = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
    }
    if precision == "bf16":
        ours |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    merged = _merge(ours, user)
    if (stage := merged["zero_optimization"].get("stage")) not in (0, 1, 2):
        raise UserError(f"ZeRO stage {stage}", "supported: 0, 1, 2")
    return merged


def _merge(base: Mapping, over: Mapping) -> dict:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged
