"""The trained model of a run, read back from its directory.

Exports and evaluations are made from it. The one place that decides which checkpoint of a run is the trained model.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, PretrainedConfig

from ..errors import UserError
from ..hybrid.assemble import assemble
from ..hybrid.model import HybridModel
from ..hybrid.settings import AdapterConfig, LayerSpec, QuantizeConfig, StudentConfig
from ..teacher.load import load_teacher
from ..teacher.tokenizer_files import TOKENIZER_FILES
from ..training.checkpoint import open_checkpoint
from ..training.frozen_weights import NAME, frozen_weights_digest, read_frozen_weights
from .directory import RunDirectory

LEGAL_FILES = ("LICENSE*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True)
class TrainedRun:
    """A run directory, checked and resolved; no weights are loaded yet.

    Attributes:
        directory: of the run.
        config: its resolved configuration, as plain values.
        stage: the last finished stage.
        checkpoint: directory of that stage's newest checkpoint.
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
    def teacher(self) -> str:
        """Local path or hub id of the teacher."""
        return self.config["teacher"]["path"]

    @property
    def teacher_id(self) -> str:
        """The teacher's `public_name`."""
        return public_name(self.teacher)

    @property
    def spec(self) -> StudentConfig:
        """What the student is."""
        return StudentConfig.model_validate(self.config["student"])

    @property
    def layers(self) -> LayerSpec:
        """What the stage quantized, and its adapters."""
        quantize = QuantizeConfig.model_validate(self.config.get("quantize") or {})
        adapters = [AdapterConfig.model_validate(fields) for fields in self.config.get("adapters") or ()]
        return LayerSpec.of_stage(quantize, adapters, self.config["stages"][self.stage].get("quantize"))

    def teacher_config(self) -> PretrainedConfig:
        """Return the teacher's transformers configuration."""
        return AutoConfig.from_pretrained(self.teacher, revision=self._revision)

    def teacher_files(self) -> Path:
        """Return the directory with the teacher's tokenizer, card and legal files.

        They are downloaded when the teacher is a hub id.
        """
        if Path(self.teacher).is_dir():
            return Path(self.teacher)
        patterns = [*TOKENIZER_FILES, "*.py", *LEGAL_FILES, "README.md"]
        return Path(snapshot_download(self.teacher, revision=self._revision, allow_patterns=patterns))

    def load_model(self) -> HybridModel:
        """Return the student as it was trained, on the CPU in evaluation mode.

        It has the teacher's weights in fp32 with its own on top; what was quantized and adapted in training is so here,
        with the same numbers.

        Raises:
            UserError: the teacher is gone, incomplete, or not used up; the checkpoint is damaged or of another student.
        """
        checkpoint, folder = open_checkpoint(self.checkpoint), self.checkpoint.parent
        if checkpoint.state.get("settings", {}).get("frozen") != frozen_weights_digest(folder):
            raise UserError(
                f"{folder / NAME} is not the file that {self.checkpoint.name} was trained with",
                "restore it from a copy of the run",
            )
        lm = load_teacher(self.teacher, self._revision, torch.float32)
        return assemble(lm, self.spec, self.layers, checkpoint.tensors(), read_frozen_weights(folder))

    @property
    def _revision(self) -> str | None:
        return self.config["teacher"].get("revision")


def public_name(model: str) -> str:
    """Return a model's hub id, or the last part of a local path.

    The path may be gone; paths of this machine do not go into an export.
    """
    return Path(model).name if Path(model).is_absolute() or Path(model).exists() else model


def open_run(path: str | Path) -> TrainedRun:
    """Return a run directory's last finished stage with its newest checkpoint.

    Raises:
        UserError: not a run directory, or nothing in it is finished.
    """
    directory = RunDirectory(path)
    config = directory.config()
    for stage in reversed(directory.finished()):
        if checkpoint := directory.newest_checkpoint(stage):
            return TrainedRun(directory, config, stage, checkpoint)
    raise UserError(
        f"{path} has no finished stage with a checkpoint", "train first; --resume continues an interrupted run"
    )
