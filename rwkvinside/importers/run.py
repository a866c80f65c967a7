"""A checkpoint of another program as a run directory, whose one stage has ended with it.

So everything that takes a run takes it: exports, evaluation, chat, reports, and stages that train on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import __version__
from ..config.load import load_config
from ..config.schema import Config
from ..errors import VerificationError
from ..hybrid.fingerprint import fingerprint
from ..hybrid.freezing import GROUPS
from ..hybrid.model import HybridModel
from ..runs.directory import DIGESTS, RunDirectory, settings_digest
from ..runs.records import StageRecord
from ..runs.trained import open_run
from ..support.digests import FileDigests
from ..support.files import file_digest, replacing
from ..support.quiet import quiet_libraries
from ..teacher.files import base_identity
from ..teacher.load import check_files, load_base, meta_teacher, teacher_config
from ..training.checkpoint import STATE, Checkpointer
from .student import Student, check_shapes, read_student

STAGE = "imported"


@dataclass(frozen=True)
class Imported:
    """What was imported.

    Attributes:
        form: whose names the checkpoint has.
        preset: its variant.
        layout: its layers, R for RWKV and A for attention.
        attention_rope: whether attention that it keeps rotates.
        tensors: how many it has.
        changed: groups of parameters in which it differs from the teacher.
    """

    form: str
    preset: str
    layout: str
    attention_rope: bool
    tensors: int
    changed: tuple[str, ...]


def import_checkpoint(
    checkpoint: str | Path,
    teacher: str,
    out: str | Path,
    *,
    preset: str | None = None,
    attention_rope: bool | None = None,
) -> Imported:
    """Make a run directory of a published or an earlier checkpoint.

    What the checkpoint does not have, as training files do that hold the trained part alone, is the teacher's.

    Args:
        checkpoint: RWKV-Infer's `.pth`, a training file of the earlier project, or a Hugging Face directory.
        teacher: the model that it was made from: a directory, a preset or a hub id.
        out: directory to create; it may exist only if it is empty.
        preset: its variant, where tensors do not tell.
        attention_rope: whether the attention that it keeps rotates, where its file does not tell.

    Raises:
        UserError: `out` is not empty, the checkpoint is damaged, is of another teacher, or leaves something open.
    """
    quiet_libraries()
    checkpoint, out = Path(checkpoint), Path(out)
    RunDirectory(out).claim(stage=None, resume=False)
    base = load_config([], teacher=teacher, out=str(out)).teacher
    check_files(base)
    student = read_student(checkpoint, teacher_config(base), preset=preset, attention_rope=attention_rope)
    shapes = HybridModel.from_teacher(meta_teacher(base), student.spec)
    parameters = shapes.canonical_parameters()
    own = shapes.own_names()
    check_shapes(checkpoint, student, {n: tuple(p.shape) for n, p in parameters.items()}, own, shapes.teacher_tied)
    model = HybridModel.from_teacher(load_base(base, torch.float32), student.spec)
    tensors = _differing(model, student.tensors)
    changed = sorted({shapes.group_of(name)[0] for name in tensors}, key=list(GROUPS).index)
    model.load_student_state_dict(tensors)
    config = _config(student, changed, teacher, out)
    with replacing(out.absolute()) as partial:
        partial.mkdir()
        _write(RunDirectory(partial), config, model, checkpoint.name)
        _check(partial, student.tensors)
    kept = student.spec.attention_layers
    layout = "".join("A" if i in kept else "R" for i in range(shapes.lm.config.num_hidden_layers))
    rotates = student.spec.attention_rope
    return Imported(student.form.value, student.spec.preset, layout, rotates, len(student.tensors), tuple(changed))


def _differing(model: HybridModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return in fp32 the mixers, and what is not the teacher's bit for bit."""
    parameters, own = model.canonical_parameters(), model.own_names()
    exact = {name: tensor.float() for name, tensor in tensors.items()}
    return {n: t for n, t in exact.items() if n in own or not torch.equal(t, parameters[n].detach())}


def _config(student: Student, changed: list[str], teacher: str, out: Path) -> Config:
    """Return the configuration of the run: a stage of distillation that has ended."""
    stage = {"objective": "distill", "tokens": 1, "train": changed, "evaluate_every_tokens": None}
    settings = {
        "student": student.spec.model_dump(mode="json", exclude_unset=True),
        "run": [STAGE],
        "stages": {STAGE: stage},
    }
    return load_config([settings], teacher=teacher, out=str(out))


def _write(directory: RunDirectory, config: Config, model: HybridModel, source: str) -> None:
    """Write everything that a run with one finished stage has."""
    records, digests = directory.records, FileDigests(directory.path / DIGESTS)
    records.make_identity(base_identity(config.teacher, digests))
    digests.save()
    run = records.identity()
    assert run is not None
    directory.describe(config, f"imported from {source}\n", {})
    folder, found = directory.stage(STAGE), fingerprint(model)
    state = {"stage": STAGE, "step": 0, "finished": True, "settings": {"adapters": [], "frozen": None}}
    saved = Checkpointer(folder, found, run=run.run).save(0, model.student_state_dict(), None, state, required=True)
    assert saved is not None
    records.write(
        StageRecord(
            run=run.run,
            stage=STAGE,
            before=None,
            after=records.digest_before(None),
            settings=settings_digest(directory.config()),
            files={f"{saved.name}/{STATE}": file_digest(saved / STATE)},
            checkpoint=saved.name,
        )
    )
    facts = {"rwkvinside": __version__, "run": run.run, "teacher": config.teacher.path, "student": found}
    directory.note(facts | {"imported": source}, finished=STAGE)


def _check(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a run whose trained model has other tensors than the checkpoint."""
    parameters = open_run(folder).load_model().canonical_parameters()
    if wrong := [name for name, tensor in tensors.items() if not torch.equal(parameters[name], tensor.float())]:
        raise VerificationError(f"what was written has other values, first in {wrong[0]}")
