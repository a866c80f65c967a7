"""Micro-batches as large as a GPU's memory allows, for stages that leave them open.

A GPU waits for Python where its kernels are short: on an H200, a model of 0.6B in micro-batches of 4096 tokens kept it
busy for a third of the time. Which rows run together changes nothing but the order of sums.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from ..config.resolve import resolve
from ..config.schema import Config
from ..errors import UserError
from ..hybrid.model import HybridModel
from ..stages.plan import RunPlan, StagePlan
from ..stages.teacher import meta_online_teacher
from ..teacher.kinds import TeacherKind
from ..training.batching import rows_within
from .devices import device_memory
from .plan import meta_student, prepared_stages
from .stage_memory import stage_memory

LARGEST = 32768  # tokens of a micro-batch; with more, kernels do not get faster
USABLE = 0.85  # of a GPU's memory: the rest is for its context, and what an allocator cannot use


def resolve_fitted(
    config: Config,
    stages: Sequence[str] | None = None,
    ranks: int = 1,
    kept: Sequence[int] | None = None,
    done: Collection[str] = (),
    *,
    launched: bool = False,
    gpu: str | None = None,
) -> RunPlan:
    """Return what a configuration resolves to on this machine, or on a GPU that is not here.

    Args:
        config, stages, ranks, kept, done, launched: see `resolve`.
        gpu: name of a GPU that is not here, such as H100; the device is cuda then.

    Raises:
        UserError: as `resolve`, or an unknown GPU, or one for a run on a CPU.
    """
    if gpu is not None:
        if config.device == "cpu":
            raise UserError(f"the plan is for a GPU, {gpu}, but the device is cpu", "leave out one of them")
        config = config.model_copy(update={"device": "cuda"})
    plan = resolve(config, stages, ranks, kept, done, launched)
    memory = device_memory(plan.settings.device, gpu)
    return plan if plan.settings.device == "cpu" or memory is None else fitted(plan, memory)


def fitted(plan: RunPlan, memory: int) -> RunPlan:
    """Return the same plan with larger micro-batches where they fit, and without CUDA graphs where these do not.

    A stage with `batch.micro_rows` keeps it, and one with `cuda_graphs: true` its graphs.

    Args:
        plan: from `resolve`.
        memory: bytes of the device of one rank.
    """
    stages = []
    for stage, model, kind in prepared_stages(plan, meta_student(plan.settings)):
        stages.append(_fitted(stage, model, kind, int(USABLE * memory)) if stage.stage.trains else stage)
    return replace(plan, stages=tuple(stages))


def _fitted(plan: StagePlan, model: HybridModel, kind: TeacherKind | None, memory: int) -> StagePlan:
    """Return a stage with micro-batches doubled as long as they fit, without graphs where its smallest do not."""
    teacher = meta_online_teacher(plan) if kind is TeacherKind.ONLINE else None

    def fits(one: StagePlan) -> bool:
        return stage_memory(one, model, kind, teacher).peak <= memory

    if plan.settings.cuda_graphs == "auto" and not fits(plan):  # graphs keep the memory of a micro-batch
        plan = replace(plan, settings=plan.settings.model_copy(update={"cuda_graphs": False}))
    if plan.settings.batch.micro_rows is not None:
        return plan
    share = -(-plan.shape.rows // plan.shape.ranks)
    most = min(share, rows_within(LARGEST, plan.length.seq_len))
    while plan.shape.micro_rows < most:
        larger = replace(plan, shape=replace(plan.shape, micro_rows=min(2 * plan.shape.micro_rows, most)))
        if not fits(larger):
            break
        plan = larger
    return plan
