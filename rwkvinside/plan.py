"""The dry run: what a configuration would do, from shapes alone. No weights are loaded and nothing is written."""

from __future__ import annotations

from .config import Config, StageConfig
from .distill.hybrid import HybridModel
from .memory import MICRO_TOKENS, Shape, checkpoint_bytes, memory_bytes
from .models import device_and_precision, meta_student, prepare_stage

NEW = "mixer.lora"  # the one group that the teacher does not have


def plan_text(config: Config, stages: list[str] | None = None, ranks: int = 1) -> str:
    """The plan of a run as text.

    Args:
        config: the whole configuration.
        stages: those to show, None = all of `run`. Earlier ones count for what has been trained before.
        ranks: processes that share the work; more than one means DeepSpeed.

    Raises:
        UserError: whatever of the student can only be seen with its parameters, such as a pattern that matches nothing.
    """
    device, precision = device_and_precision(config)
    model = meta_student(config)
    teacher = _teacher_parameters(model)
    table = model.group_table()
    total = sum(count for *_, count in table)
    new = dict((group, count) for group, _, count in table).get(NEW, 0)
    c = model.lm.config
    layer_map = "".join("R" if i in model.rwkv_layers else "A" for i in range(c.num_hidden_layers))
    engine = f"DeepSpeed, ZeRO {config.deepspeed.zero_stage}" if ranks > 1 else "one process"
    untied = ", head copied from the tied embedding" if model.teacher_tied else ""
    mixer = model.mixer_config
    lines = [
        f"teacher   {config.teacher.path}: {c.model_type}, {c.num_hidden_layers} layers, width {c.hidden_size}, "
        f"{mixer.num_heads} heads of {mixer.head_size} ({mixer.num_kv_heads} for keys), {_count(teacher)} parameters",
        f"student   {config.student.preset}, key scale {mixer.key_scale}, {config.student.init} start, "
        f"{_count(total)} parameters: {_count(total - new)} copied from the teacher{untied}, {_count(new)} new",
        f"layers    {layer_map}   ({len(model.rwkv_layers)} R = RWKV, {layer_map.count('A')} A = attention)",
        f"device    {device}, {precision}, {ranks} {'ranks' if ranks > 1 else 'rank'}, {engine}",
        f"run       {' -> '.join(config.run)}, into {config.out}",
    ]
    for name in stage_order(config, stages):
        stage = config.stages[name]
        source = prepare_stage(model, stage)
        if stages is None or name in stages:
            lines += ["", *_stage_lines(name, stage, config, model, source, precision, ranks, teacher)]
    return "\n".join(lines) + "\n"


def stage_order(config: Config, stages: list[str] | None) -> list[str]:
    """The stages of `run`, then those that were asked for by name beyond it."""
    return [*config.run, *(name for name in stages or () if name not in config.run)]


def micro_rows(stage: StageConfig, ranks: int) -> int:
    """Rows of a micro-batch on one rank."""
    share = -(-stage.rows // ranks)
    return min(share, stage.batch.micro_rows or max(1, MICRO_TOKENS // stage.data.seq_len))


def _stage_lines(
    name: str,
    stage: StageConfig,
    config: Config,
    model: HybridModel,
    source: str | None,
    precision: str,
    ranks: int,
    teacher: int,
) -> list[str]:
    seq_len, rows = stage.data.seq_len, micro_rows(stage, ranks)
    data = ", ".join(stage.data.train or config.data.train) or "none given yet (--data)"
    title = name if name == stage.objective else f"{name} ({stage.objective})"
    lines = [f"{title}: {_count(stage.tokens)} tokens in rows of {seq_len}", f"  data      {data}"]
    table = model.group_table()
    if stage.objective == "calibrate":
        lines += _table([(group, "fitted" if group.startswith("mixer.") else "frozen", n) for group, _, n in table])
    else:
        lines.append(
            f"  steps     {stage.steps} of {stage.rows} rows ({stage.rows * seq_len} tokens), "
            f"{rows} rows at a time on each rank"
        )
        lines += _optim_lines(stage, model)
        if stage.objective == "distil":
            lines.append(f"  teacher   {'the frozen weights of the student' if source == 'same' else 'a second model'}")
        trains = [(g, "trains" if t == n else f"{_count(t)} train" if t else "frozen", n) for g, t, n in table]
        lines += _table(trains)
    lines += _memory_lines(stage, config, model, source, precision, ranks, teacher, rows * seq_len)
    return lines


def _optim_lines(stage: StageConfig, model: HybridModel) -> list[str]:
    optim, groups = stage.optim, model.trainable_groups()
    given = {"mixer": ("mixers", optim.lr), "rest": ("rest", optim.lr_rest)}
    rates = [f"{label} {rate:.3g}" for group, (label, rate) in given.items() if groups[group]]
    d = optim.decay
    decay = f"{d.shape} to {optim.lr_final:.3g} between {100 * d.start:.3g} % and {100 * d.end:.3g} % of the tokens"
    return [f"  rates     {', '.join(rates)}; warm-up {optim.warmup_steps} steps, {decay}, clip {optim.clip:g}"]


def _table(rows: list[tuple[str, str, int]]) -> list[str]:
    lines = [f"  {'group':<12}{'parameters':>12}  {'in this stage':<16}start"]
    for group, state, count in rows:
        start = "new" if group == NEW else "copied from the teacher"
        lines.append(f"  {group:<12}{_count(count):>12}  {state:<16}{start}")
    return lines


def _memory_lines(stage, config, model, source, precision, ranks, teacher, tokens) -> list[str]:
    table = model.group_table()
    trainable = sum(t for _, t, _ in table)
    c, mixer = model.lm.config, model.mixer_config
    attention = sum(
        p.numel() for i in model.rwkv_layers for p in model.lm.model.layers[i].self_attn.teacher_attn.parameters()
    )
    shape = Shape(
        trainable=trainable,
        frozen=sum(n for *_, n in table) - trainable,
        kept_attention=attention if source == "same" else 0,
        teacher=teacher if source == "separate" else 0,
        layers=c.num_hidden_layers,
        width=c.hidden_size,
        inner=c.intermediate_size,
        mixer=mixer.num_heads * mixer.head_size,
        vocab=c.vocab_size if stage.loss is not None else 0,
        mixers_only=stage.objective in ("calibrate", "align"),
        held=stage.tokens if stage.objective == "calibrate" else 0,
    )
    parts = memory_bytes(
        shape,
        tokens=tokens,
        chunk_tokens=stage.loss.chunk_tokens if stage.loss is not None else 0,
        bf16=precision == "bf16",
        launcher=ranks > 1,
        zero=config.deepspeed.zero_stage,
        ranks=ranks,
        checkpointing=stage.activation_checkpointing,
    )
    shown = " + ".join(f"{name} {_bytes(size)}" for name, size in parts.items() if size)
    saved = sum(p.numel() for n, p in model.canonical_parameters().items() if n in model.trained)
    disk = _bytes(checkpoint_bytes(saved, trainable))
    return [
        f"  memory    about {_bytes(sum(parts.values()))} a rank: {shown}",
        f"  disk      {disk} a checkpoint, {config.checkpoint.keep} kept",
    ]


def _teacher_parameters(model: HybridModel) -> int:
    mixers = {id(p) for mixer in model.mixers.values() for p in mixer.parameters()}
    parameters = sum(p.numel() for p in model.parameters() if id(p) not in mixers)
    return parameters - (model.lm.lm_head.weight.numel() if model.teacher_tied else 0)


def _count(number: int) -> str:
    for size, suffix in ((10**9, " B"), (10**6, " M"), (10**3, " K")):
        if number >= size:
            return f"{number / size:.4g}{suffix}"
    return str(number)


def _bytes(number: int) -> str:
    for size, suffix in ((2**30, "GiB"), (2**20, "MiB")):
        if number >= size:
            return f"{number / size:.3g} {suffix}"
    return f"{number / 2**10:.3g} KiB"
