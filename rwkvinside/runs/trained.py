"""The trained model of a run, read back from its directory.

Exports and evaluations are made from it. The one place that decides which checkpoint of a run is the trained model.
"""

import logging
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, PretrainedConfig

from ..errors import UserError
from ..hybrid.assemble import assemble
from ..hybrid.model import HybridModel
from ..hybrid.settings import AdapterConfig, LayerSpec, QuantizeConfig, StudentConfig
from ..support.digests import FileDigests
from ..teacher.files import LEGAL_FILES, base_identity, check_unchanged
from ..teacher.load import load_base, teacher_config
from ..teacher.settings import TeacherConfig
from ..teacher.tokenizer_files import TOKENIZER_FILES, tokenizer_folder
from ..training.checkpoint import open_checkpoint, step_of
from ..training.frozen_weights import read_frozen_weights
from .directory import DIGESTS, RunDirectory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedRun:
    """A run directory, checked and resolved; no weights are loaded yet.

    Attributes:
        directory: of the run.
        config: its resolved configuration, as plain values.
        stage: the last finished stage.
        checkpoint: directory of the checkpoint of that stage which is the trained model.
    """

    directory: RunDirectory
    config: dict
    stage: str
    checkpoint: Path

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.directory.path

    @property
    def step(self) -> int:
        """Optimizer steps of the stage that were done."""
        return step_of(self.checkpoint)

    @property
    def id(self) -> str | None:
        """The run's own id; None: an earlier version made it."""
        return (identity := self.directory.records.identity()) and identity.run

    @property
    def teacher_digests(self) -> dict[str, str]:
        """What tells the teacher that the run began with from another one; {} where an earlier version made the run."""
        return identity.teacher if (identity := self.directory.records.identity()) else {}

    @property
    def base(self) -> TeacherConfig:
        """The model that the student was made from."""
        return TeacherConfig.model_validate(self.config["teacher"])

    @property
    def teacher(self) -> str | None:
        """Local path or hub id of the teacher; None: the model was trained from nothing."""
        return None if self.base.fresh else self.base.path

    @property
    def teacher_id(self) -> str | None:
        """The teacher's `public_name`."""
        return None if self.teacher is None else public_name(self.teacher)

    @property
    def spec(self) -> StudentConfig:
        """What the student is at the end of the stage: with the layers that the run has chosen, once it has."""
        spec = StudentConfig.model_validate(self.config["student"])
        if spec.layer_choice is None:
            return spec
        kept = self.directory.records.kept_layers(self.stage) or ()
        return spec.model_copy(update={"attention_layers": kept})

    @property
    def layers(self) -> LayerSpec:
        """What the stage quantized, and its adapters."""
        quantize = QuantizeConfig.model_validate(self.config.get("quantize") or {})
        adapters = [AdapterConfig.model_validate(fields) for fields in self.config.get("adapters") or ()]
        return LayerSpec.of_stage(quantize, adapters, self.config["stages"][self.stage].get("quantize"))

    def teacher_config(self) -> PretrainedConfig:
        """Return the teacher's transformers configuration."""
        if self.teacher is None:
            return teacher_config(self.base)
        return AutoConfig.from_pretrained(self.teacher, revision=self.teacher_revision)

    def teacher_files(self) -> Path:
        """Return the directory with the teacher's tokenizer, card and legal files.

        They are downloaded when the teacher is a hub id.
        """
        if self.teacher is None:
            return tokenizer_folder(self.base.path, self.teacher_revision)
        if Path(self.teacher).is_dir():
            return Path(self.teacher)
        patterns = [*TOKENIZER_FILES, "*.py", *LEGAL_FILES, "README.md"]
        return Path(snapshot_download(self.teacher, revision=self.teacher_revision, allow_patterns=patterns))

    def load_model(self) -> HybridModel:
        """Return the student as it was trained, on the CPU in evaluation mode.

        It has the teacher's weights in fp32 with its own on top; what was quantized and adapted in training is so here,
        with the same numbers.

        Raises:
            UserError: the teacher is gone, incomplete, or not used up; the checkpoint is damaged or of another student.
        """
        checkpoint, folder = open_checkpoint(self.checkpoint, self.id), self.checkpoint.parent
        frozen = read_frozen_weights(folder, checkpoint.state.get("settings", {}).get("frozen"))
        lm = load_base(self.base, torch.float32)
        return assemble(lm, self.spec, self.layers, checkpoint.tensors(), frozen)

    @property
    def teacher_revision(self) -> str | None:
        """Branch, tag or commit of the teacher's repository."""
        return self.base.revision


def public_name(model: str) -> str:
    """Return a model's hub id, or the last part of a local path.

    The path may be gone; paths of this machine do not go into an export.
    """
    return Path(model).name if Path(model).is_absolute() or Path(model).exists() else model


def open_run(path: str | Path, checkpoint: str = "best") -> TrainedRun:
    """Return a run directory's last finished stage with one of its checkpoints.

    Args:
        path: of the run directory.
        checkpoint: see `RunDirectory.checkpoint`.

    Raises:
        UserError: not a run directory, nothing in it is finished, or it is not as the run has left it: see
            `Records.finished`, `check_teacher`.
    """
    directory = RunDirectory(path)
    directory.config()  # a directory without one is not a run
    for stage in reversed(directory.finished()):
        if directory.newest_checkpoint(stage):
            run = at_stage(directory, stage, checkpoint)
            check_teacher(run)
            return run
    raise UserError(
        f"{path} has no finished stage with a checkpoint", "train first; --resume continues an interrupted run"
    )


def at_stage(directory: RunDirectory, stage: str, which: str = "last") -> TrainedRun:
    """Return a run as it was at the end of a stage, or where the stage is now.

    Args:
        directory: of the run.
        stage: its name.
        which: see `RunDirectory.checkpoint`.

    Raises:
        UserError: the stage has no checkpoint, or it is not the one that the stage ended with.
    """
    checkpoint = directory.checkpoint(stage, which)
    if checkpoint is None:
        raise UserError(
            f"stage {stage} of {directory.path} has no checkpoint", "keep more of them: a larger checkpoint.keep"
        )
    return TrainedRun(directory, directory.config_of(stage), stage, checkpoint)


def check_teacher(run: TrainedRun) -> None:
    """Refuse a run whose teacher has changed since it began.

    A run of an earlier version has not noted its teacher, and a line says so.

    Raises:
        UserError: says which of the teacher's files differ.
    """
    if run.id is None:
        _say_unidentified(run.path)
        return
    digests = FileDigests(run.path / DIGESTS)
    current = base_identity(run.base, digests)
    check_unchanged(f"teacher {run.base.path}", run.teacher_digests, current)
    with suppress(UserError):  # a run that may only be read: they are computed again the next time
        digests.save()


@cache  # an export opens the run twice
def _say_unidentified(path: Path) -> None:
    logger.warning(
        "run %s has no identity: it was made by an older version, so neither its teacher nor its stages are checked",
        path,
    )
