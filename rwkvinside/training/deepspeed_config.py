"""DeepSpeed's configuration, as plain values.

It joins what follows from the configuration and what the user's own file says. DeepSpeed itself is not imported, so
that a plan can show the result.
"""

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
HINT = "set it in the configuration (`stages`, `precision`, `deepspeed`), or write auto in DeepSpeed's file"


def settle(zero: DeepSpeedConfig) -> DeepSpeedConfig:
    """Return the settings as DeepSpeed's own configuration changes them.

    What `config` says takes the place of the fields; its `zero_optimization` with a stage takes the place of stage and
    offloading as a whole.

    Raises:
        UserError: a section of `config` is not a mapping.
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
    """Return what is handed to `deepspeed.initialize`.

    It has the user's sections over ours, with "auto" filled in. Batch sizes, clipping, precision, optimizer and
    schedule follow from the configuration. A user's file may repeat them, as "auto" or with the same value; optimizer
    and scheduler are then left out, because they are handed over as objects. `train_batch_size` is left out too:
    DeepSpeed wants rows that divide by the ranks, the trainer does not.

    Raises:
        UserError: a value contradicts the configuration, the ZeRO stage does not exist, or offloading lacks sharding.
    """
    user = {key: value for key, value in (zero.config or {}).items() if value != AUTO}
    _check_sections(_settled(user))
    bf16 = precision == "bf16"
    configured = {
        "train_micro_batch_size_per_gpu": shape.micro_rows,
        "gradient_accumulation_steps": shape.micro_batches,
        "gradient_clipping": settings.clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    for key, value in {"train_batch_size": shape.rows, **configured}.items():
        _agree(user, key, value)
    _check_optimizer(user.pop("optimizer", {}), settings)
    if parameters := _settled(user.pop("scheduler", {})).get("params"):
        raise UserError(
            f"DeepSpeed's scheduler sets {', '.join(parameters)}", "the configuration has the schedule: leave it out"
        )
    ours: dict[str, Any] = {**configured, "steps_per_print": 1_000_000_000}
    for section, allowed in (("fp16", False), ("bf16", bf16), ("torch_autocast", bf16)):
        if user.get(section, {}).get("enabled") is not True:
            user.pop(section, None)
        elif not allowed:
            raise UserError(f"DeepSpeed's file enables {section}, the configuration's precision is {precision}", HINT)
    bf16_weights = "bf16" in user or (bf16 and zero.bf16_weights)
    stage = zero.zero_stage
    if bf16_weights:
        # DeepSpeed's plain bf16 optimizer starts with an empty step, which shifts Adam's bias correction
        stage = max(stage, 1)
        ours |= {"bf16": {"enabled": True, "check_grad_overflow": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    elif bf16:
        # no module whose gradients would be reduced in bf16
        ours["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    user = _settled(user)
    if "stage" not in user.get("zero_optimization", {}):
        choices = zip(OFFLOADS, (zero.offload_optimizer, zero.offload_parameters), strict=True)
        cpu = {name: {"device": "cpu"} for name, chosen in choices if chosen}
        ours["zero_optimization"] = {"stage": stage} | cpu
    merged = _merge(ours, user)
    _check_zero(merged["zero_optimization"])
    if settings.kind != "adamw" and merged["zero_optimization"]["stage"]:
        raise UserError(
            f"optim.kind {settings.kind} cannot be sharded: its blocks of 8-bit states cross parameters",
            "use optim.kind=adamw, whose states ZeRO shards, or deepspeed.zero_stage=0",
        )
    if bf16_weights and not merged["zero_optimization"]["stage"]:
        raise UserError("DeepSpeed's file combines bf16 with ZeRO 0", "use zero_optimization.stage 1, 2 or 3")
    return merged


def offloads(section: Mapping, name: str) -> bool:
    """Return whether a `zero_optimization` moves one of `OFFLOADS` to CPU memory.

    null and device none do not.
    """
    return (section.get(name) or {}).get("device") == "cpu"


def _check_sections(config: Mapping) -> None:
    """Refuse a section that is not a mapping (`UserError`)."""
    sections = {name: config.get(name, {}) for name in SECTIONS}
    if isinstance(zero := sections["zero_optimization"], Mapping):
        sections |= {f"zero_optimization.{name}": zero.get(name) or {} for name in OFFLOADS}
    for name, section in sections.items():
        if not isinstance(section, Mapping):
            raise UserError(f"DeepSpeed's file sets {name}={section!r}", "it must be a mapping of settings")


def _agree(user: dict, key: str, value: object) -> None:
    """Take a key of the configuration out of the user's sections.

    It may only repeat what the configuration says.
    """
    if (users := user.pop(key, value)) != value:
        raise UserError(f"DeepSpeed's file sets {key}={users!r}, the configuration gives {value!r}", HINT)


def _check_optimizer(section: Mapping, settings: OptimConfig) -> None:
    if str(section.get("type", AUTO)).lower() not in (AUTO, "adam", "adamw"):
        raise UserError(f"DeepSpeed's file sets optimizer.type={section['type']!r}", "training is with AdamW")
    configured = {"betas": list(settings.betas), "eps": settings.eps, "weight_decay": settings.weight_decay}
    for key, value in _settled(section.get("params", {})).items():
        if key not in configured or value != configured[key]:
            raise UserError(f"DeepSpeed's file sets optimizer.params.{key}={value!r}", HINT)


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
    """Return a section without what is "auto" on any level.

    DeepSpeed's defaults or ours hold there.
    """
    return {
        key: _settled(value) if isinstance(value, Mapping) else value for key, value in section.items() if value != AUTO
    }


def _merge(base: Mapping, over: Mapping) -> dict:
    merged = dict(base)
    for key, value in over.items():
        under = merged.get(key)
        merged[key] = _merge(under, value) if isinstance(under, Mapping) and isinstance(value, Mapping) else value
    return merged
