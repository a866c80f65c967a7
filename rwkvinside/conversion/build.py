"""The parts of one stage: student, engine, what its checkpoints remember.

What happens with them is in `stage.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor

from ..data.batch import Batch
from ..errors import UserError
from ..evaluate.quality import Scores
from ..hybrid.adapters import adapter_directory, learns_at_once, write_peft
from ..hybrid.assemble import adapters_of, assemble, frozen_weights_of
from ..hybrid.model import HybridModel
from ..hybrid.settings import LayerSpec
from ..planning.flops import training_flops
from ..planning.stage_memory import original_bytes
from ..runs.directory import RunDirectory
from ..stages.cuda_graphs import uses_graphs
from ..stages.param_groups import rate_groups
from ..stages.phases import Phase
from ..stages.plan import StagePlan
from ..stages.teacher import original_teacher
from ..support.text import rounded_bytes
from ..teacher.kinds import TeacherKind
from ..teacher.load import load_base
from ..teacher.signals import OfflineTeacher, OnlineTeacher, Teacher
from ..training.cuda_graphs import CudaRecorder
from ..training.deepspeed_engine import DeepSpeedEngine
from ..training.frozen_weights import NAME, read_frozen_weights, write_frozen_weights
from ..training.gradient_watch import GradientWatch
from ..training.local_engine import LocalEngine
from ..training.process_group import Distributed
from ..training.protocols import Step

SHARE = 0.8  # of the free memory that an additional teacher may take


def make_student(
    plan: StagePlan,
    before: dict[str, Tensor] | None,
    frozen: dict[str, Tensor] | None,
    device: torch.device,
    text: Callable[[], Batch] | None = None,
    earlier: dict[str, Tensor] | None = None,
) -> HybridModel:
    """Return the student at the start of a stage, on the CPU.

    Mixers and all that was trained are fp32, with precision fp32 all that is not quantized.

    Args:
        plan: of the stage.
        before: the student's tensors after the stage before; None at the start of a conversion.
        frozen: what the stage quantized when it began, see `read_frozen`.
        device, text: with what to quantize otherwise, see `assemble`.
        earlier: what the stage before quantized; None at the start of a conversion.
    """
    run = plan.run
    torch.manual_seed(run.seed)
    lm = load_base(run.teacher, run.teacher_dtype, fused=run.fused)
    student = assemble(lm, run.student, plan.layers, before, frozen, device, text, earlier)
    return student.float() if run.precision == "fp32" else student


def read_frozen(directory: RunDirectory, stage: str) -> dict[str, Tensor] | None:
    """Return what a stage has quantized, None where it has not begun or quantizes nothing.

    Raises:
        UserError: it is not what the stage's record says.
    """
    return read_frozen_weights(directory.stage(stage), frozen_digest(directory, stage))


def frozen_digest(directory: RunDirectory, stage: str) -> str | None:
    """Return the digest of what a stage has quantized, from its record."""
    record = directory.records.stage(stage)
    return record.files.get(NAME) if record else None


def save_frozen_weights(student: HybridModel, directory: RunDirectory, stage: str) -> dict[str, str]:
    """Write what a stage has quantized, if that was not done before.

    For one process, before anything trains.

    Returns:
        The digest by the name of the file, {} where the stage quantizes nothing.
    """
    digest = frozen_digest(directory, stage)
    if digest is None and (tensors := frozen_weights_of(student)):
        digest = write_frozen_weights(directory.stage(stage), tensors)
    return {} if digest is None else {NAME: digest}


def stage_settings(plan: StagePlan, directory: RunDirectory) -> dict:
    """Return what a resumed stage must share, as JSON values.

    With it adapters and quantized weights mean the same.
    """
    return {"adapters": _adapter_settings(plan.layers), "frozen": frozen_digest(directory, plan.name)}


def check_adapters(layers: LayerSpec, state: Mapping) -> None:
    """Refuse a checkpoint whose adapters would compute something else in a stage.

    Args:
        layers: of the stage.
        state: of the checkpoint.

    Raises:
        UserError: shows both settings.
    """
    written = state.get("settings", {}).get("adapters")
    current = _adapter_settings(layers)
    if written and written != current:
        raise UserError(
            f"the weights to start from were trained with other adapters: {written} there, {current} here",
            "leave `adapters` as it was, or start a new run",
        )


def _adapter_settings(layers: LayerSpec) -> list[dict]:
    return [adapter.model_dump(mode="json") for adapter in layers.adapters]


def write_adapters(
    layers: LayerSpec, student: HybridModel, tensors: Mapping[str, Tensor], directory: Path
) -> list[Path]:
    """Write the adapters of a finished stage as PEFT directories.

    They are `adapter`, `adapter-2`, ... in the stage's directory.

    Args:
        layers: of the stage.
        student: has the adapters; its weights are not read.
        tensors: of the stage's last checkpoint.
        directory: of the stage.

    Returns:
        The files.
    """
    folders = []
    for i, (spec, weights) in enumerate(adapters_of(student, layers, tensors)):
        folders.append(directory / adapter_directory(i))
        write_peft(folders[-1], spec, weights)
    return [file for folder in folders for file in sorted(folder.iterdir())]


def evaluation_teacher(teacher: Teacher | None) -> Teacher | None:
    """Return the teacher that an evaluation can ask.

    A teacher on disk knows the rows of its stage only.
    """
    return None if isinstance(teacher, OfflineTeacher) else teacher


def watch_adapters(step: Step[Batch], student: HybridModel) -> Step[Batch]:
    """Return a step that makes sure that adapters learn, where some train."""
    trainable = {name: p for name, p in student.canonical_parameters().items() if p.requires_grad}
    watched = {name: p for name, p in trainable.items() if learns_at_once(name)}
    return GradientWatch(step, watched) if watched else step


def make_engine(
    plan: StagePlan, phase: Phase, student: HybridModel, world: Distributed
) -> LocalEngine | DeepSpeedEngine:
    """Return the engine of a phase.

    Its optimizer is over what `Stage.prepare` has made trainable.
    """
    groups = {name: group.parameters for name, group in rate_groups(student, plan, phase).items()}
    common = student, groups, plan.optim, world, plan.run.precision
    if not world.launched:
        asked = plan.settings.cuda_graphs is True
        return LocalEngine(*common, CudaRecorder(world.device, asked) if uses_graphs(student, plan) else None)
    return DeepSpeedEngine(*common, plan.run.zero, plan.shape)


def work_of(plan: StagePlan, student: HybridModel, kind: TeacherKind | None, teacher: Teacher | None) -> float:
    """Return the operations for a token.

    `Stage.prepare` has made trainable what trains; to be asked before an engine is made.
    """
    second = teacher.module.lm if isinstance(teacher, OnlineTeacher) else None
    return training_flops(student, plan, kind, second).total


def original_for(
    plan: StagePlan, formats: Sequence[str], world: Distributed, say: Callable[[str], None]
) -> OnlineTeacher | None:
    """Return the original of a quantized teacher, for the last numbers of a stage.

    None: the stage's own teacher is the original or another model, or no memory is left for the original on every rank,
    which is said.

    Args:
        formats: from `teacher_formats`.
        say: prints a line.
    """
    if not formats:
        return None
    needed = original_bytes(plan, world.size if world.launched else 1)
    cuda = world.device.type == "cuda"
    free = torch.cuda.mem_get_info(world.device)[0] if cuda else psutil.virtual_memory().available
    if world.all_reduce_sum([needed > SHARE * free])[0]:
        say(
            f"{plan.name}: no memory for the original teacher ({rounded_bytes(needed)}): the last numbers compare with "
            f"the one that is quantized ({', '.join(formats)}); `rwkvinside eval RUN` compares with the original"
        )
        return None
    return original_teacher(plan, world)


def numbers(scores: Scores, teacher: Teacher | None) -> dict[str, float]:
    """Return what an evaluation reports by name.

    Without a teacher it is the student's cross-entropy alone.
    """
    if teacher is None:
        return {"ce": scores.ce}
    return {"kl": scores.kl, "ce": scores.ce, "ce_teacher": scores.ce_teacher, "agreement": scores.agreement}
