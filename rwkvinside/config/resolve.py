"""From a configuration to the plan of a run.

Everything that follows from a configuration is computed here, once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from ..data.sources import endless_tokens
from ..errors import UserError
from ..families.fused_layers import LIBRARY, Fused, available
from ..hybrid.layouts import LayerChoice, uniform_layers
from ..hybrid.settings import LayerSpec
from ..stages.phases import phases_of
from ..stages.plan import RunPlan, RunSettings, StagePlan
from ..stages.registry import stage_class
from ..stages.settings import StageConfig
from ..support.extras import import_extra
from ..teacher.settings import TeacherConfig, TeacherModelConfig
from ..training.batching import StepShape
from .load import check_section
from .precision import frozen_dtype, resolve_device, resolve_precision, teacher_dtype
from .schema import Config
from .teacher_lookup import find_teacher

TRIAL = "distill"  # the stage whose settings short distillations have


def resolve(
    config: Config,
    stages: Sequence[str] | None = None,
    ranks: int = 1,
    kept: Sequence[int] | None = None,
    done: Collection[str] = (),
    launched: bool = False,
) -> RunPlan:
    """Return the plan of a run.

    Where the run chooses its layers, all are RWKV up to the stage that does. Later stages have the chosen ones; as long
    as these are not known, as many that are spread evenly stand for them, which need the same memory and work.

    Args:
        config: from `load_config`.
        stages: names of those that run now; None: all of `run`. Earlier ones count for what has been trained before.
        ranks: processes that share the work.
        kept: layers that the run has chosen; None: none yet.
        done: stages that have ended, whose steps may have fewer rows than there are ranks now.
        launched: one rank trains under DeepSpeed, too.

    Raises:
        UserError: a stage of that name is not configured, or has steps of fewer rows than ranks.
    """
    for name in stages or ():
        if name not in config.stages:
            raise UserError(f"there is no stage {name!r}", f"stages: {', '.join(config.stages)}")
    order = [*config.run, *(name for name in stages or () if name not in config.run)]
    selected = tuple(config.run if stages is None else stages)
    running = [name for name in selected if name not in done]
    config = with_steps(config, running, ranks)
    longest = max(config.stages[name].length.tokens_read for name in order)
    settings = _run_settings(config, longest, ranks, launched, tuple(kept or ()))
    choice = settings.choice
    plans = tuple(_stage_plan(name, config.stages[name], config, settings) for name in order)
    for plan in plans:
        if plan.name in running:
            _check_rows(plan)
    if choice is not None:
        trials = trial_plans(config, settings, choice)
        plans = tuple(replace(plan, trials=trials) if plan.stage.chooses_layers else plan for plan in plans)
        plans = _with_choice(plans, choice, kept)
    return RunPlan(settings, plans, selected)


def _run_settings(config: Config, longest: int, ranks: int, launched: bool, kept: tuple[int, ...]) -> RunSettings:
    """Return what all stages share, of which the longest reads so many tokens; else see `resolve`."""
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    loaded_dtype = teacher_dtype(config.teacher.dtype, device, precision)
    choice, given = config.student.layer_choice, config.student
    return RunSettings(
        teacher=config.teacher,
        student=given if choice is None else given.model_copy(update={"attention_layers": kept}),
        data=config.data,
        seed=config.seed,
        device=device,
        precision=precision,
        teacher_dtype=loaded_dtype,
        frozen_dtype=frozen_dtype(loaded_dtype, precision),
        ranks=ranks,
        deepspeed=launched or ranks > 1,
        zero=config.deepspeed,
        endless_tokens=endless_tokens(config.data, longest),
        choice=choice,
        fused=_fused(config.fused_layers, device),
    )


def with_steps(config: Config, stages: Collection[str], ranks: int, begun: Mapping[str, int] | None = None) -> Config:
    """Return the configuration with steps for so many ranks, where `batch.tokens` is left out.

    A warm-up that is left out follows from the steps.

    Args:
        config: from `load_config`.
        stages: those that are to run: each of their steps has a row for every rank.
        ranks: processes that share the work.
        begun: tokens of a step in the run that goes on, by stage; what is not there has its default.

    Raises:
        UserError: a stage has too few of such steps for what it unfreezes.
    """
    changed = {}
    for name, stage in config.stages.items():
        if "tokens" in stage.batch.model_fields_set:
            continue
        sharing = ranks if name in stages and stage_class(name, stage.objective)().trains else 1
        tokens = max((begun or {}).get(name, stage.batch.tokens), sharing * stage.data.seq_len)
        if tokens != stage.batch.tokens:
            changed[name] = _with_step(name, stage, tokens)
    return config.model_copy(update={"stages": config.stages | changed})


def _with_step(name: str, stage: StageConfig, tokens: int) -> StageConfig:
    stage = stage.model_copy(update={"batch": stage.batch.filled(tokens=tokens)})
    if stage.optim is not None and "warmup_steps" not in stage.optim.model_fields_set:
        warmup = stage_class(name, stage.objective).warmup_steps(stage.length.steps)
        stage = stage.model_copy(update={"optim": stage.optim.filled(warmup_steps=warmup)})
    check_section(StageConfig, stage.model_dump(), source=f"stages.{name} with batch.tokens {tokens}")
    return stage


def _check_rows(plan: StagePlan) -> None:
    """Refuse steps in which a rank would have nothing to do."""
    rows, ranks, seq_len = plan.shape.rows, plan.shape.ranks, plan.length.seq_len
    if rows < ranks:
        raise UserError(
            f"stages.{plan.name}.batch.tokens={plan.length.batch_tokens} is {rows} rows of data.seq_len={seq_len}, "
            f"too few for {ranks} processes",
            f"raise it to {ranks * seq_len} at least, or start {rows} processes at most",
        )


def trial_plans(config: Config, run: RunSettings, choice: LayerChoice) -> tuple[StagePlan, ...]:
    """Return the rounds of a choice by short distillations, () where none distills.

    They are the stage `distill` with mixers alone, on fewer tokens, and with the student itself as teacher.

    Args:
        config: of the run.
        run: from `resolve`.
        choice: how layers are chosen.
    """
    if choice.distill is None:
        return ()
    distill, rounds = config.stages[TRIAL], []
    stage = stage_class(TRIAL, distill.objective)
    if not stage.follows_teacher or distill.optim is None or distill.optim.warmup_steps is None:
        raise UserError(
            f"a choice with `distill` trains as stages.{TRIAL} says, whose objective is {distill.objective}",
            f"leave stages.{TRIAL} its own objective, and name other stages differently",
        )
    endless = max(run.endless_tokens, endless_tokens(config.data, choice.distill))
    run = replace(run, ranks=1, deepspeed=False, endless_tokens=endless)
    for tokens in choice.rounds:
        steps = replace(distill.length, total_tokens=tokens).steps
        warmup = min(distill.optim.warmup_steps, stage.warmup_steps(steps))
        optim = distill.optim.model_copy(update={"warmup_steps": warmup, "rates": {}})
        own = {"tokens": tokens, "train": ["mixer"], "unfreeze": [], "optim": optim, "cuda_graphs": False}
        own |= {"teacher": "auto", "teacher_model": TeacherModelConfig(), "teacher_cache": None}
        rounds.append(_stage_plan(TRIAL, distill.model_copy(update=own), config, run))
    return tuple(rounds)


def _fused(setting: str | bool, device: str) -> Fused:
    if setting is True:
        if device != "cuda":
            raise UserError(f"fused_layers on {device}: its kernels run on cuda only", "leave fused_layers as it is")
        import_extra(LIBRARY, "fused_layers")
    return available() if device == "cuda" and setting else Fused()


def _with_choice(
    plans: tuple[StagePlan, ...], choice: LayerChoice, kept: Sequence[int] | None
) -> tuple[StagePlan, ...]:
    """Return the stages with their students: all layers RWKV up to the stage that chooses."""
    teacher = plans[0].run.teacher
    if kept is None:
        count = find_teacher(teacher.path, revision=teacher.revision, fields=teacher.config).num_layers
        kept = uniform_layers(count, choice.keep)
    layers: tuple[int, ...] = ()
    resolved = []
    for plan in plans:
        student = plan.run.student.model_copy(update={"attention_layers": layers})
        resolved.append(replace(plan, run=replace(plan.run, student=student)))
        layers = tuple(kept) if plan.stage.chooses_layers else layers
    return tuple(resolved)


def _stage_plan(name: str, settings: StageConfig, config: Config, run: RunSettings) -> StagePlan:
    length, stage = settings.length, stage_class(name, settings.objective)()
    ranks = run.ranks if stage.trains else 1  # a stage that does not train runs in one process
    return StagePlan(
        name=name,
        stage=stage,
        settings=settings,
        run=run,
        length=length,
        shape=StepShape.of(length, settings.batch.micro_rows, ranks),
        phases=phases_of(settings),
        layers=LayerSpec.of_stage(config.quantize, config.adapters, settings.quantize),
        signal_teacher=_signal_teacher(config.teacher, settings),
    )


def _signal_teacher(converted: TeacherConfig, settings: StageConfig) -> TeacherConfig:
    """Return the model that a stage's teacher distributions come from.

    It is `teacher_model`, or else the model that is converted.
    """
    second = settings.teacher_model
    if second.path is None:
        return converted
    info = find_teacher(second.path, revision=second.revision)
    fields = info.preset["teacher"]["config"] if info.preset else None
    named = {"path": info.path, "revision": second.revision, "config": fields, "fresh": False}
    return converted.model_copy(update=named)
