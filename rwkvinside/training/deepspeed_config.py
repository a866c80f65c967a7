"""DeepSpeed's configuration: what follows from the recipe, and what a user's own file says. Plain values, without
DeepSpeed itself, so that a plan can show it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UserError
from .batching import StepShape
from .settings import DeepSpeedConfig, OptimConfig

AUTO = "auto"


SECTIONS = ("optimizer", "scheduler", "bf16", "fp16", "torch_autocast", "zero_optimization")


OFFLOADS = ("offload_optimizer", "offload_param")
OFFLOAD_FIELDS = ("offload_optimizer", "offload_parameters")  # of `DeepSpeedConfig`, in the same order


CURE = "set it in the recipe (`stages`, `precision`, `deepspeed`), or write auto in DeepSpeed's file"


def settle(zero: DeepSpeedConfig) -> DeepSpeedConfig:
    """Return the settings with what DeepSpeed's own configuration (`config`) says in place of the fields.

    A `zero_optimization` with a stage takes the place of stage and offloading as a whole.

    Raises:
        UserError: a section of `config` that is not a mapping.
    """
    config = _settled(zero.config or {})
    _check_sections(config)
    section = config.get("zero_optimization", {})
    changes = {"bf16_weights": config.get("bf16", {}).get("enabled") is True or zero.bf16_weights}
    if "stage" in section:
        offloaded = {name: offloads(section, key) for name, key in zip(OFFLOAD_FIELDS, OFFLOADS, strict=True)}
        changes |= {"zero_stage": section["stage"], **offloaded}
    return zero.model_copy(update=changes)


def deepspeed_config(zero: DeepSpeedConfig, settings: OptimConfig, precision: str, shape: StepShape) -> dict:
    """What is handed to `deepspeed.initialize`: the user's sections over ours, "auto" filled in.

    Batch sizes, clipping, precision, optimizer and schedule follow from the recipe. A user's file may repeat them, as
    "auto" or with the same value; optimizer and scheduler are then left out, because they are handed over as objects.
    `train_batch_size` is left out too: DeepSpeed wants rows that divide by the ranks, the trainer does not.

    Raises:
        UserError: a value that contradicts the recipe, a ZeRO stage that does not exist, offloading without sharding.
    """
    user = {key: value for key, value in (zero.config or {}).items() if value != AUTO}
    _check_sections(_settled(user))
    bf16 = precision == "bf16"
    _agree(user, "train_batch_size", shape.rows)
    _agree(user, "train_micro_batch_size_per_gpu", shape.micro_rows)
    _agree(user, "gradient_accumulation_steps", shape.micro_batches)
    _agree(user, "gradient_clipping", settings.clip)
    _agree(user, "zero_allow_untested_optimizer", True)
    _agree(user, "zero_force_ds_cpu_optimizer", False)
    _check_optimizer(user.pop("optimizer", {}), settings)
    if given := _settled(user.pop("scheduler", {})).get("params"):
        raise UserError(f"DeepSpeed's scheduler sets {', '.join(given)}", "the recipe has the schedule: leave it out")
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": shape.micro_rows,
        "gradient_accumulation_steps": shape.micro_batches,
        "gradient_clipping": settings.clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
    }
    for section, allowed in (("fp16", False), ("bf16", bf16), ("torch_autocast", bf16)):
        if user.get(section, {}).get("enabled") is not True:
            user.pop(section, None)
        elif not allowed:
            raise UserError(f"DeepSpeed's file enables {section}, the recipe's precision is {precision}", CURE)
    own_bf16 = "bf16" in user or (bf16 and zero.bf16_weights)
    stage = zero.zero_stage
    if own_bf16:
        # its plain bf16 optimizer starts with an empty step, which shifts Adam's bias correction
        stage = max(stage, 1)
        ours |= {"bf16": {"enabled": True, "check_grad_overflow": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    elif bf16:
        # no module whose gradients would be reduced in bf16
        ours["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    user = _settled(user)
    if "stage" not in user.get("zero_optimization", {}):
        wanted = zip(OFFLOADS, (zero.offload_optimizer, zero.offload_parameters), strict=True)
        cpu = {name: {"device": "cpu"} for name, chosen in wanted if chosen}
        ours["zero_optimization"] = {"stage": stage} | cpu
    merged = _merge(ours, user)
    _check_zero(merged["zero_optimization"])
    if settings.kind != "adamw" and merged["zero_optimization"]["stage"]:
        raise UserError(
            f"optim.kind {settings.kind} cannot be sharded: its blocks of 8-bit states cross parameters",
            "use optim.kind=adamw, whose states ZeRO shards, or deepspeed.zero_stage=0",
        )
    if own_bf16 and not merged["zero_optimization"]["stage"]:
        raise UserError("DeepSpeed's file combines bf16 with ZeRO 0", "use zero_optimization.stage 1, 2 or 3")
    return merged


def offloads(section: Mapping, name: str) -> bool:
    """Whether a `zero_optimization` moves one of `OFFLOADS` to CPU memory; null and device none do not."""
    return (section.get(name) or {}).get("device") == "cpu"


def _check_sections(config: Mapping) -> None:
    """Refuse what DeepSpeed wants as a mapping and is none (`UserError`)."""
    sections = {name: config.get(name, {}) for name in SECTIONS}
    if isinstance(zero := sections["zero_optimization"], Mapping):
        sections |= {f"zero_optimization.{name}": zero.get(name) or {} for name in OFFLOADS}
    for name, section in sections.items():
        if not isinstance(section, Mapping):
            raise UserError(f"DeepSpeed's file sets {name}={section!r}", "this is a mapping of settings")


def _agree(user: dict, key: str, value: object) -> None:
    """Take a key of the recipe out of the user's sections; it may only repeat what the recipe says."""
    if (given := user.pop(key, value)) != value:
        raise UserError(f"DeepSpeed's file sets {key}={given!r}, the recipe gives {value!r}", CURE)


def _check_optimizer(section: Mapping, settings: OptimConfig) -> None:
    if str(section.get("type", AUTO)).lower() not in (AUTO, "adam", "adamw"):
        raise UserError(f"DeepSpeed's file sets optimizer.type={section['type']!r}", "the recipe trains with AdamW")
    given = _settled(section.get("params", {}))
    wanted = {"betas": list(settings.betas), "eps": settings.eps, "weight_decay": settings.weight_decay}
    for key, value in given.items():
        if key not in wanted or value != wanted[key]:
            raise UserError(f"DeepSpeed's file sets optimizer.params.{key}={value!r}", CURE)


def _check_zero(section: Mapping) -> None:
    stage = section.get("stage")
    if stage not in (0, 1, 2, 3):
        raise UserError(f"ZeRO stage {stage!r}", "supported: 0, 1, 2, 3")
    if offloads(section, "offload_optimizer") and not stage:
        raise UserError("offloading the optimizer needs ZeRO", "use deepspeed.zero_stage=1, 2 or 3")
    if offloads(section, "offload_param") and stage != 3:
        raise UserError(f"offloading parameters needs ZeRO 3, not {stage}", "use deepspeed.zero_stage=3")
    for name in OFFLOADS:
        if (device := (section.get(name) or {}).get("device", "cpu")) not in ("cpu", "none"):
            raise UserError(f"DeepSpeed's file offloads to {device!r}", "supported: cpu")


def _settled(section: Mapping) -> dict:
    """Without what is "auto" on any level: DeepSpeed's own defaults or ours hold there."""
    return {
        key: _settled(value) if isinstance(value, Mapping) else value for key, value in section.items() if value != AUTO
    }


def _merge(base: Mapping, over: Mapping) -> dict:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged
