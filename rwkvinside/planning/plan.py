"""The dry run: what a configuration would do, from shapes alone. No weights are loaded and nothing is written."""

from __future__ import annotations

import json

import psutil
import torch

from ..config.precision import device_and_precision
from ..config.schema import Config, StageConfig
from ..data.sources import describe
from ..errors import UserError
from ..hybrid.assemble import apply, layer_lines
from ..hybrid.model import HybridModel
from ..stages.param_groups import rate_groups
from ..stages.phases import phases
from ..stages.prepare import meta_student, optimizer_settings, prepare_stage, stage_layers, zero_settings
from ..support.text import rounded_bytes, rounded_count
from ..training.batching import step_shape
from ..training.deepspeed_config import deepspeed_config
from ..training.loggers import check_loggers
from ..training.optimizer_8bit import check_optimizer
from .devices import card_for
from .flops import training_flops
from .memory import Memory, checkpoint_bytes
from .stage_memory import second_teacher, stage_memory, trained_bytes
from .training_table import training_table

NEW = "mixer.lora"  # the one group that the teacher does not have
LOSSES = {"forward": "KL(teacher || student)", "reverse": "KL(student || teacher)", "js": "Jensen-Shannon"}
TEACHERS = {
    "same": "the student's own frozen weights",
    "separate": "a second model",
    "cache": "logits on disk",
}


def plan_text(config: Config, stages: list[str] | None = None, ranks: int = 1) -> str:
    """The plan of a run as text.

    Args:
        config: the whole configuration.
        stages: those to show, None = all of `run`. Earlier ones count for what has been trained before.
        ranks: processes that share the work; more than one means DeepSpeed.

    Raises:
        UserError: whatever of the student can only be seen with its parameters, such as a pattern that matches nothing;
            a logger whose package is missing.
    """
    check_loggers(config.loggers)
    device, precision = device_and_precision(config)
    model = meta_student(config)
    teacher = teacher_parameters(model)
    table = model.group_table()
    # a head that is still the embedding counts once
    total = sum({id(p): p.numel() for p in model.canonical_parameters().values()}.values())
    new = {group: count for group, _, count in table}.get(NEW, 0)
    c = model.lm.config
    layer_map = "".join("R" if i in model.rwkv_layers else "A" for i in range(c.num_hidden_layers))
    engine = f"DeepSpeed, ZeRO {zero_settings(config).settled().stage}" if ranks > 1 else "one process"
    mixer = model.mixer_config
    lines = [
        f"teacher   {config.teacher.path}: {c.model_type}, {c.num_hidden_layers} layers, width {c.hidden_size}, "
        f"{mixer.num_heads} heads of {mixer.head_size} ({mixer.num_kv_heads} for keys), "
        f"{rounded_count(teacher)} parameters",
        *([f"variant   {', '.join(config.variant)}"] if config.variant else []),
        f"student   {config.student.preset}, key scale {mixer.key_scale}, {config.student.init} start, "
        f"{rounded_count(total)} parameters: {rounded_count(total - new)} copied from the teacher, "
        f"{rounded_count(new)} new",
        f"layers    {layer_map}   ({len(model.rwkv_layers)} R = RWKV, {layer_map.count('A')} A = attention)",
        f"device    {device}, {precision}, {ranks} {'ranks' if ranks > 1 else 'rank'}, {engine}",
        f"loggers   {', '.join(['metrics.jsonl', *config.loggers])}",
        f"run       {' -> '.join(config.run)}, into {config.out}",
    ]
    shown, made = {}, None
    for name in stage_order(config, stages):
        stage = config.stages[name]
        if (wanted := stage_layers(config, name)) != made:  # otherwise nothing of it has changed
            apply(model, wanted)
            made = wanted
        if stage.optim is not None:
            check_optimizer(stage.optim.kind, device)
        source = prepare_stage(model, stage, phases(stage)[-1].train if stage.unfreeze else None)
        if stages is None or name in stages:
            text, settings = _stage_lines(name, config, model, source, device, precision, ranks)
            lines += ["", *text]
            if settings and settings not in shown.values():
                shown[name] = settings
                lines.append(f"  deepspeed {json.dumps(settings)}")
    return "\n".join(lines) + "\n"


def stage_order(config: Config, stages: list[str] | None) -> list[str]:
    """The stages of `run`, then those that were asked for by name beyond it; one that there is not is a `UserError`."""
    for name in stages or ():
        if name not in config.stages:
            raise UserError(f"there is no stage {name!r}", f"stages: {', '.join(config.stages)}")
    return [*config.run, *(name for name in stages or () if name not in config.run)]


def teacher_parameters(model: HybridModel) -> int:
    """Parameters of the teacher that a fresh student was made from."""
    mixers = {id(p) for mixer in model.mixers.values() for p in mixer.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in mixers)


def _stage_lines(
    name: str, config: Config, model: HybridModel, source: str | None, device: str, precision: str, ranks: int
) -> tuple[list[str], dict | None]:
    """The text on a stage, and what DeepSpeed is given for it where it runs."""
    stage = config.stages[name]
    title = name if name == stage.objective else f"{name} ({stage.objective})"
    lines = [f"{title}: {rounded_count(stage.tokens)} tokens in rows of {stage.data.seq_len}"]
    lines.append(f"  data      {describe(config, stage)}")
    lines += [f"  {line}" for line in layer_lines(model, stage_layers(config, name))]
    settings = None
    teacher = second_teacher(config, stage) if source == "separate" else None
    if stage.objective == "calibrate":
        lines += _calibrated(model)
    else:
        shape = step_shape(stage, ranks)
        lines.append(
            f"  steps     {stage.steps} of {stage.rows} rows ({stage.rows * stage.data.seq_len} tokens), "
            f"{shape.micro_rows} rows at a time on each rank"
        )
        lines += _optim_lines(stage, model)
        lines += _loss_lines(stage, source)
        lines += [f"  {line}" for line in training_table(model, stage, phases(stage)[0])]
        flops = training_flops(model, stage, source, teacher).total
        lines.append(f"  work      {flops / 1e9:.3g} GFLOP a token, {flops * stage.tokens / 1e15:.4g} PFLOP in all")
        if ranks > 1:
            settings = deepspeed_config(zero_settings(config), optimizer_settings(stage), precision, shape)
    memory = stage_memory(config, stage, model, source, teacher, device, precision, ranks)
    lines += _memory_lines(memory, device)
    saved, trainable = trained_bytes(model)
    size = checkpoint_bytes(saved, trainable)
    fixed = sum(layer.nbytes for layer in model.quantized.values())
    more = f", and {rounded_bytes(fixed)} of quantized weights once" if fixed else ""
    lines.append(
        f"  disk      {rounded_bytes(size)} a checkpoint, {config.checkpoint.keep} kept{more}: "
        f"{rounded_bytes((config.checkpoint.keep + 1) * size + fixed)} at most"
    )
    return lines, settings


def _calibrated(model: HybridModel) -> list[str]:
    lines = [f"  {'group':<12}{'parameters':>12}  in this stage"]
    for group, _, count in model.group_table():
        lines.append(f"  {group:<12}{rounded_count(count):>12}  {'fitted' if group.startswith('mixer.') else 'frozen'}")
    quantized: dict[tuple[str, str], int] = {}
    for name, layer in model.quantized.items():
        of = model.group_of(f"{name}.weight")[-1], layer.format
        quantized[of] = quantized.get(of, 0) + layer.weight_numel
    for (group, form), count in quantized.items():
        lines.append(f"  {group:<12}{rounded_count(count):>12}  frozen in {form}")
    return lines


def _optim_lines(stage: StageConfig, model: HybridModel) -> list[str]:
    optim = stage.optim
    groups = rate_groups(model, stage, phases(stage)[-1])
    rates = [f"{label} {group.rate:.3g}" for label, group in groups.items()]
    d = optim.decay
    decay = f"{d.shape} to {optim.lr_final:.3g} between {100 * d.start:.3g} % and {100 * d.end:.3g} % of the tokens"
    kind = "" if optim.kind == "adamw" else f"{optim.kind}; "
    return [f"  rates     {kind}{', '.join(rates)}; warm-up {optim.warmup_steps} steps, {decay}, clip {optim.clip:g}"]


def _loss_lines(stage: StageConfig, source: str | None) -> list[str]:
    loss = stage.loss
    if loss is None:
        return []
    parts = [f"{loss.kl:g} {LOSSES[loss.divergence]}"] if loss.kl else []
    parts[-1:] = [f"{part} of its {loss.top_k} likeliest tokens" if loss.top_k else part for part in parts]
    parts += [f"{loss.ce:g} cross-entropy"] if loss.ce else []
    heat = f" at temperature {loss.temperature:g}" if loss.kl and loss.temperature != 1 else ""
    lines = [f"  loss      {' + '.join(parts)}{heat}"]
    if stage.objective == "distill":
        given, text = stage.teacher_model, TEACHERS[source]
        if source == "separate":
            text = f"{text}, {given.path}" if given.path else f"{text} of the same weights"
            text += f", in {given.quantize}" if given.quantize else ""
            text += ", sharded over the ranks" if given.shard else ""
        elif source == "cache":
            text += f" in {stage.teacher_cache}"
        lines.append(f"  teacher   {text}")
    return lines


def _memory_lines(memory: Memory, device: str) -> list[str]:
    training = sum(memory.device.values())
    moments = {"training": training, "saving": memory.saving, "evaluating": memory.evaluating}
    largest = max(moments, key=moments.__getitem__)
    more = "" if largest == "training" else f", while {largest}; {rounded_bytes(training)} while training"
    shown = " + ".join(f"{name} {rounded_bytes(size)}" for name, size in memory.device.items() if size)
    lines = [f"  memory    about {rounded_bytes(memory.peak)} a rank{more}", f"            {shown}"]
    if memory.host:
        lines.append(f"  host      about {rounded_bytes(memory.host)} of the host's memory a rank")
    return lines + _fit_lines(memory.peak, device)


def _fit_lines(peak: int, device: str) -> list[str]:
    """Whether it fits: on the device that is here, or on which card where there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        card = card_for(peak)
        return [f"            fits a GPU of {card} GB" if card else "            DOES NOT FIT any common GPU"]
    total = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else psutil.virtual_memory().total
    here = "GPU" if device == "cuda" else "machine"
    return [] if peak <= total else [f"            DOES NOT FIT: this {here} has {rounded_bytes(total)}"]
