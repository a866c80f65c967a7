"""What an export is made from: the teacher's weights and the student's, read back from a run directory.

The one place that decides which checkpoint of a run is "the trained model".
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from ..distill.hybrid import HybridModel, StudentSpec
from ..errors import UserError

# Everything of a teacher's repository that a release passes on unchanged, beside the weights.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
LEGAL_FILES = ("LICENSE*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True)
class TrainedRun:
    """A run directory, checked and resolved; no weights are loaded yet.

    Attributes:
        path: the run directory.
        config: its resolved configuration, as plain values.
        conversion: its conversion.json.
        stage: the last finished stage.
        checkpoint: directory of that stage's newest checkpoint.
    """

    path: Path
    config: dict
    conversion: dict
    stage: str
    checkpoint: Path

    @property
    def teacher(self) -> str:
        """Local path or hub id of the teacher."""
        return self.config["teacher"]["path"]

    @property
    def teacher_id(self) -> str:
        """The teacher's public name: its hub id, or the last part of a local path (paths of this machine stay here)."""
        return Path(self.teacher).name if Path(self.teacher).exists() else self.teacher

    @property
    def spec(self) -> StudentSpec:
        student = dict(self.config["student"])
        student["attention_layers"] = tuple(student.get("attention_layers") or ())
        student["ranks"] = {name: rank for name, rank in (student.get("ranks") or {}).items() if rank}
        return StudentSpec(**student)

    def teacher_config(self):
        """The teacher's transformers configuration."""
        return AutoConfig.from_pretrained(self.teacher, revision=self._revision)

    def teacher_files(self) -> Path:
        """Directory with the teacher's tokenizer, card and legal files (downloaded when the teacher is a hub id)."""
        if Path(self.teacher).is_dir():
            return Path(self.teacher)
        patterns = [*TOKENIZER_FILES, *LEGAL_FILES, "README.md"]
        return Path(snapshot_download(self.teacher, revision=self._revision, allow_patterns=patterns))

    def load_model(self) -> HybridModel:
        """Teacher weights and the student's on top, on the CPU in fp32 (4 bytes per parameter), in evaluation mode.

        Raises:
            UserError: a teacher that is gone, incomplete, or not used up; a checkpoint that is damaged or of another
                student.
        """
        try:
            lm, info = AutoModelForCausalLM.from_pretrained(
                self.teacher, revision=self._revision, dtype=torch.float32, output_loading_info=True
            )
        except OSError as error:
            raise UserError(
                f"teacher {self.teacher} cannot be loaded: {str(error).splitlines()[0]}",
                "the export needs the teacher's weights where they were in training, or the hub",
            ) from error
        if problems := {kind: sorted(map(str, names)) for kind, names in info.items() if names}:
            raise UserError(f"the weights of teacher {self.teacher} do not fit its configuration: {problems}")
        model = HybridModel.from_teacher(lm, self.spec)
        model.load_student_state_dict(self.load_student())
        return model.eval()

    def load_student(self) -> dict[str, torch.Tensor]:
        """The student's own tensors, by exported name.

        Raises:
            UserError: the file is missing, truncated, or not what its state.json says.
        """
        file = self.checkpoint / "model.safetensors"
        try:
            recorded = _json(self.checkpoint / "state.json").get("files", {}).get(file.name, {}).get("sha256")
            if recorded is not None and recorded != sha256(file):
                raise UserError(
                    f"{file} is not the file that was saved (its SHA-256 differs)", "use another checkpoint"
                )
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"checkpoint {file} cannot be read: {error}", "use another checkpoint") from error

    @property
    def _revision(self) -> str | None:
        return self.config["teacher"].get("revision")


def open_run(path: str | Path) -> TrainedRun:
    """Resolve a run directory to its last finished stage and that stage's newest checkpoint.

    Raises:
        UserError: not a run directory, or nothing in it is finished.
    """
    path = Path(path)
    try:
        config = yaml.safe_load((path / "config.yaml").read_text())
        conversion = _json(path / "conversion.json")
    except FileNotFoundError as error:
        raise UserError(f"{path} is not a run directory: {Path(error.filename).name} is missing") from error
    for stage in reversed(conversion.get("finished_stages", [])):
        checkpoints = sorted((path / "stages" / stage).glob("step-*"))
        if checkpoints:
            return TrainedRun(path, config, conversion, stage, checkpoints[-1])
    raise UserError(
        f"{path} has no finished stage with a checkpoint", "train first; --resume continues an interrupted run"
    )


def sha256(file: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _json(file: Path) -> dict:
    return json.loads(file.read_text())
