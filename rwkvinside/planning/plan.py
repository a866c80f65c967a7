"""The dry run: what a configuration would do, from shapes alone.

No weights are loaded and nothing is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from ..config.schema import Config
from ..data.sources import describe
from ..errors import UserError
from ..export.gguf.layout import ARCHITECTURE as LLAMA_CPP
from ..export.gguf.layout import NARROW, WIDE_HEADS
from ..export.gguf.vocabulary import vocabulary
from ..export.limits import exports_line, reasons_against
from ..families.registry import find
from ..hybrid.assemble import apply, layer_lines
from ..hybrid.model import HybridModel
from ..hybrid.row_states import row_bytes
from ..hybrid.settings import StudentConfig
from ..modeling.mixer_presets import TimeMixerConfig
from ..stages.plan import RunPlan, RunSettings, StagePlan
from ..stages.teacher import meta_online_teacher
from ..support.text import rounded_bytes, rounded_count, rounded_flop, spans
from ..teacher.kinds import TeacherKind
from ..teacher.load import meta_teacher, open_tokenizer, teacher_config
from ..training.deepspeed_config import deepspeed_config, settle
from ..training.loggers import check_loggers
from ..training.optimizer_8bit import check_optimizer
from .devices import RESERVED, card_for, device_memory, expected_time
from .fit_flops import calibration_flops
from .flops import flops_per_token, trial_flops
from .memory import Memory, checkpoint_bytes
from .stage_memory import stage_memory, trained_bytes

NEW = "mixer.lora"  # the one group that the teacher does not have


def plan_text(plan: RunPlan, config: Config, gpu: str | None = None) -> str:
    """Return the plan of a run as text.

    Args:
        plan: from `config.resolve`; the stages that do not run count for what has been trained before.
        config: for what names the run: variants, loggers, output.
        gpu: name of a GPU that is not here, such as H100; None: the device of this machine.

    Raises:
        UserError: what can only be seen with the student's parameters is wrong, such as a pattern that matches nothing;
            the package of a logger is missing; an unknown GPU.
    """
    check_loggers(config.loggers)
    model = meta_student(plan.settings)
    lines = _run_lines(plan, config, model, gpu)
    shown: list[dict] = []
    for stage, of_stage, kind in prepared_stages(plan, model):
        if stage.name not in plan.selected:
            continue
        lines += ["", *_stage_lines(stage, of_stage, kind, config.checkpoint.keep, gpu)]
        if plan.settings.deepspeed and stage.stage.trains:
            settings = deepspeed_config(plan.settings.zero, stage.optim, plan.settings.precision, stage.shape)
            if settings not in shown:
                shown.append(settings)
                lines.append(f"  deepspeed {json.dumps(settings)}")
    return "\n".join([*lines, "", exports_line(model.lm.config, config.student)]) + "\n"


def prepared_stages(plan: RunPlan, model: HybridModel) -> Iterator[tuple[StagePlan, HybridModel, TeacherKind | None]]:
    """Yield the stages of a run, the student having the layers of each, and as trainable what trains at its end.

    Args:
        plan: from `config.resolve`.
        model: of `meta_student`; changed from stage to stage.

    Yields:
        The stage, its student, and where its teacher's side comes from.
    """
    layers = None
    for stage in plan.stages:
        if stage.run.student != model.spec:  # its layers are chosen; what was trained before are mixers alone
            model, layers = meta_student(stage.run), None
        if stage.layers != layers:  # otherwise they are as in the stage before
            apply(model, stage.layers)
            layers = stage.layers
        if stage.stage.trains:
            check_optimizer(stage.optim.kind, plan.settings.device)
        yield stage, model, stage.stage.prepare(model, stage, stage.phases[-1].train)


def run_warnings(run: RunSettings) -> list[str]:
    """Return what one may not expect of a run."""
    student = run.student
    missing = [] if run.teacher.fresh else student.missing_of_variant()
    warnings = [f"not the published {student.preset}: {'; '.join(missing)}"] if missing else []
    return warnings + (_llama_cpp_warnings(run) if student.preset == LLAMA_CPP else [])


def _llama_cpp_warnings(run: RunSettings) -> list[str]:
    """Return why llama.cpp will not run a student that is made for it, or where it will not."""
    config, reasons = teacher_config(run.teacher), []
    reasons += reasons_against(config, run.student)["gguf"]
    if any(Path(run.teacher.path).glob("tokenizer*")):  # else it is on the hub, and the export looks at it
        try:
            vocabulary(open_tokenizer(run.teacher), config)
        except UserError as error:
            reasons.append(error.cause)
    if reasons:
        return [f"llama.cpp will not run this student: {'; '.join(reasons)}"]
    return [WIDE_HEADS] if find(config.model_type).attention_fields(config, 0)["head_size"] > NARROW else []


def disk_bytes(plan: StagePlan, model: HybridModel, keep: int) -> int:
    """Return the bytes of a stage's checkpoints, at most.

    One more than is kept is on the disk while it is written, and quantized weights once.
    """
    frozen = sum(layer.nbytes for layer in model.quantized.values())
    return (keep + _keeps_best(plan) + 1) * _checkpoint_bytes(plan, model) + frozen


def _checkpoint_bytes(plan: StagePlan, model: HybridModel) -> int:
    carried = plan.length.rows_per_step * row_bytes(model) if plan.settings.stateful else 0
    return checkpoint_bytes(*trained_bytes(model), carried)


def _keeps_best(plan: StagePlan) -> bool:
    return plan.stage.trains and plan.settings.evaluate_every_tokens is not None  # else only the last one has a score


def meta_student(run: RunSettings) -> HybridModel:
    """Return the student's shapes without its weights, on the meta device."""
    with torch.device("meta"):
        return HybridModel.from_teacher(meta_teacher(run.teacher), run.student)


def _run_lines(plan: RunPlan, config: Config, model: HybridModel, gpu: str | None) -> list[str]:
    """Return what the plan says of the run as a whole."""
    run, c = plan.settings, model.lm.config
    layer_map = "".join("R" if i in model.rwkv_layers else "A" for i in range(c.num_hidden_layers))
    kept = [i for i, kind in enumerate(layer_map) if kind == "A"]
    engine = f"DeepSpeed, ZeRO {settle(run.zero).zero_stage}" if run.deepspeed else "one process"
    return [
        *_model_lines(run, config, model),
        f"layers    {layer_map}   ({len(model.rwkv_layers)} R = RWKV, {len(kept)} A = attention"
        f"{': ' * bool(kept)}{spans(kept)})",
        *_choice_lines(plan, model),
        *_kept_lines(model),
        f"device    {gpu or run.device}, {run.precision}, {run.ranks} {'ranks' if run.ranks > 1 else 'rank'}, {engine}",
        f"loggers   {', '.join(['metrics.jsonl', *config.loggers])}",
        f"run       {' -> '.join(config.run)}, into {config.out}",
    ]


def _model_lines(run: RunSettings, config: Config, model: HybridModel) -> list[str]:
    """Return what is made of what: a student of a teacher, or a model of nothing."""
    c, student = model.lm.config, run.student
    heads = model.family.attention_fields(c, 0)
    shape = (
        f"{c.model_type}, {c.num_hidden_layers} layers, width {c.hidden_size}, {heads['num_heads']} heads of "
        f"{heads['head_size']} ({heads['num_kv_heads']} for keys), "
    )
    # a head that is still the embedding counts once
    total = sum({id(p): p.numel() for p in model.canonical_parameters().values()}.values())
    mixer = next(iter(model.mixer_configs.values()), None)
    mixers = "" if mixer is None else f"{student.preset}, key scale {mixer.key_scale}, {_windows(model.mixer_configs)}"
    if run.teacher.fresh:
        return [
            f"model     {shape}vocabulary {c.vocab_size}, {rounded_count(total)} parameters, from nothing",
            f"tokenizer {run.teacher.path}",
            *([f"mixers    {mixers}{student.init} start{_knobs(student)}"] if mixers else []),
        ]
    new = {group: count for group, _, count in model.group_table()}.get(NEW, 0)
    return [
        f"teacher   {run.teacher.path}: {shape}{rounded_count(teacher_parameters(model))} parameters",
        *([f"recipe    {config.recipe}"] if config.recipe else []),
        *([f"variant   {', '.join(config.variant)}"] if config.variant else []),
        f"student   {mixers}{student.init} start, {rounded_count(total)} parameters: "
        f"{rounded_count(total - new)} copied from the teacher, {rounded_count(new)} new",
        *(f"warning   {text}" for text in run_warnings(run)),
    ]


def _knobs(student: StudentConfig) -> str:
    """Return the settings of mixers from nothing that are not the usual ones."""
    shown = [f", {student.shift_ratio:g} of the token shift"] if student.shift_ratio != 1 else []
    shown += [", linear attention without decay"] if student.linear_attention else []
    shown += [f", outputs scaled by {student.output_scale:g}"] if student.output_scale != 1 else []
    return "".join(shown)


def _choice_lines(plan: RunPlan, model: HybridModel) -> list[str]:
    """Return that the layers are chosen in the run, where they are."""
    choice = plan.settings.choice
    if choice is None:
        return []
    stage = next((stage.name for stage in plan.stages if stage.stage.chooses_layers), None)
    if plan.settings.student.attention_layers:
        return [f"          chosen in stage {stage} by {choice.method}; stages before it had RWKV in all layers"]
    later = next((p.run.student.attention_layers for p in plan.stages if p.run.student.attention_layers), ())
    return [
        f"          until stage {stage}: then {choice.keep} keep attention, chosen by {choice.method}",
        *([f"          memory and work of later stages are shown for layers {spans(later)}"] if later else []),
    ]


def _kept_lines(model: HybridModel) -> list[str]:
    """Return what the student's attention has that the teacher's has not."""
    lines, spec = [], model.spec
    if cut := model.kept_windows:
        (tokens, sinks), *_ = cut.values()
        first = f" and the first {sinks}" * bool(sinks)
        lines.append(f"          attention of layers {spans(list(cut))} sees the last {tokens} tokens{first}")
    if (base := spec.attention_log_base) and len(model.rwkv_layers) < model.lm.config.num_hidden_layers:
        lines.append(f"          scores of attention grow with the position, by its logarithm to the base {base:g}")
    return lines


def _windows(mixers: Mapping[int, TimeMixerConfig]) -> str:
    """Return which windows the mixers have, with their layers where they differ; "" for none."""
    layers: dict[tuple[int, int], list[int]] = {}
    for i, mixer in mixers.items():
        layers.setdefault((mixer.window, mixer.sinks), []).append(i)
    shown = []
    for (window, sinks), of in layers.items():
        text = f"window of {window}{f' and {sinks} first tokens' * bool(sinks)}" if window else "no window"
        shown.append(text if len(layers) == 1 else f"{text} in layers {spans(of)}")
    return "" if shown == ["no window"] else f"{', '.join(shown)}, "


def teacher_parameters(model: HybridModel) -> int:
    """Return the number of the teacher's parameters, from a fresh student of it."""
    mixers = {id(p) for mixer in model.mixers.values() for p in mixer.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in mixers)


def _stage_lines(
    plan: StagePlan, model: HybridModel, kind: TeacherKind | None, keep: int, gpu: str | None
) -> list[str]:
    """Return what the plan says of a stage.

    Args:
        keep: newest checkpoints that stay on disk.
        gpu: as of `plan_text`.
    """
    if plan.stage.chooses_layers:
        lines = [f"{plan.title}: {rounded_count(plan.length.total_tokens)} tokens of the validation data at most"]
    else:
        lines = [f"{plan.title}: {rounded_count(plan.length.total_tokens)} tokens in rows of {plan.length.seq_len}"]
        lines.append(f"  data      {describe(plan.run.data, plan.settings.data)}")
    details = layer_lines(model, plan.layers) + plan.stage.summary(model, plan, kind)
    teacher = meta_online_teacher(plan) if kind is TeacherKind.ONLINE else None
    if not plan.stage.fits:
        flops = flops_per_token(model, plan, kind, teacher)
        total = flops * plan.length.total_tokens
        trials = trial_flops(model, plan)
        if trials:
            details.append(f"work      {rounded_flop(total)} at most, {rounded_flop(trials)} of it for trials")
        else:
            details.append(f"work      {rounded_flop(flops)} a token, {rounded_flop(total)} in all")
    else:
        flops = sum(calibration_flops(model, plan).values())
        details.append(f"work      {rounded_flop(flops)} in all: {expected_time(flops, plan.run.device, gpu)}")
    lines += [f"  {line}" for line in details]
    lines += _memory_lines(stage_memory(plan, model, kind, teacher), plan.run.device, gpu)
    size = _checkpoint_bytes(plan, model)
    frozen = sum(layer.nbytes for layer in model.quantized.values())
    more = f", and {rounded_bytes(frozen)} of quantized weights once" if frozen else ""
    lines.append(
        f"  disk      {rounded_bytes(size)} a checkpoint, {keep}{' and the best' * _keeps_best(plan)} kept{more}: "
        f"{rounded_bytes(disk_bytes(plan, model, keep))} at most"
    )
    return lines


def _memory_lines(memory: Memory, device: str, gpu: str | None) -> list[str]:
    training = sum(memory.device.values())
    moments = {"training": training, "saving": memory.saving, "evaluating": memory.evaluating}
    largest = max(moments, key=moments.__getitem__)
    more = "" if largest == "training" else f", while {largest}; {rounded_bytes(training)} while training"
    shown = " + ".join(f"{name} {rounded_bytes(size)}" for name, size in memory.device.items() if size)
    lines = [f"  memory    about {rounded_bytes(memory.peak)} a rank{more}", f"            {shown}"]
    if memory.original:
        last, original = rounded_bytes(memory.evaluating + memory.original), rounded_bytes(memory.original)
        lines.append(
            f"            last evaluation: {last} with the original teacher ({original}), "
            "which is left out where that does not fit"
        )
    lines += _fit_lines(memory.peak, device, gpu)
    if host := memory.host():
        lines.append(f"  host      about {rounded_bytes(host)} of the host's memory a rank")
    return lines


def _fit_lines(peak: int, device: str, gpu: str | None) -> list[str]:
    """Return what does not fit, or on which card it does.

    It is checked on the GPU that is named or the device of this machine; where there is none, on common GPUs.
    """
    total = device_memory(device, gpu)
    if total is None:
        card = card_for(peak)
        return [f"            fits a GPU of {card} GB" if card else "            DOES NOT FIT any common GPU"]
    here = gpu or f"this {'GPU' if device == 'cuda' else 'machine'}"
    needed = peak + (RESERVED if gpu else 0)
    return [] if needed <= total else [f"            DOES NOT FIT: {here} has {rounded_bytes(total)}"]
