"""Compare a saved student with its teacher on documents: load both, read the texts, measure."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from ..data.batch import Batch
from ..data.rows import PaddedDocuments, document_batches
from ..data.tokenize import load_tokens
from ..errors import UserError
from ..hybrid.document_attention import attend_within_documents, cut_to_windows, run_backbone, windows_in
from ..runs.directory import RunDirectory
from ..runs.trained import open_run
from ..support.progress import Progress
from .load import load_pretrained, load_student
from .quality import Evaluation, Logits, evaluate_models

LOGITS = 2**28  # elements of a batch's logits (1 GiB in fp32), for each of the two models
LONGEST = 4096  # tokens of a document that are evaluated unless more are asked for


@dataclass(frozen=True)
class Comparison:
    """An evaluation with its models and data.

    Attributes:
        student, teacher: names of the directories, or the teacher's hub id.
        data: names of the files.
        max_length: tokens of a document that are evaluated, at most.
        truncated_documents: how many documents are longer.
        evaluation: the scores.
    """

    student: str
    teacher: str
    data: list[str]
    max_length: int
    truncated_documents: int
    evaluation: Evaluation

    def to_dict(self) -> dict:
        """Return plain JSON: what was compared, and `Evaluation.to_dict`."""
        return {
            "student": self.student,
            "teacher": self.teacher,
            "data": self.data,
            "max_length": self.max_length,
            "truncated_documents": self.truncated_documents,
            **self.evaluation.to_dict(),
        }


def evaluate_saved(
    student: str | Path,
    teacher: str | Path | None,
    data: list[str],
    *,
    max_documents: int | None = None,
    max_length: int | None = None,
    device: str = "auto",
    notes: Console | None = None,
) -> Comparison:
    """Compare an exported model, or a run as its export would be, with its teacher.

    Args:
        student: exported directory, whose model code is run, or run directory.
        teacher: directory or hub id; None is the one that the run names.
        data: files or directories, see `DocumentReader`.
        max_documents: evaluate at most the first so many.
        max_length: evaluate at most so many tokens of a document; None is 4096, or the teacher's longest context where
            that is shorter.
        device: "auto" (the first GPU if there is one), "cpu" or "cuda".
        notes: console for what is being loaded, and for progress; None is silent.

    Raises:
        UserError: a directory that is neither a model nor a run, no teacher, data that cannot be read.
    """
    student, notes = Path(student), notes or Console(quiet=True)
    if teacher is None:
        teacher = _named_teacher(student)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    student_model = load_student(student, device, notes)
    teacher_model = load_pretrained(teacher, device)
    max_length = max_length or min(LONGEST, teacher_model.config.max_position_embeddings)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = AutoTokenizer.from_pretrained(teacher)
        documents = read_documents(data, tokenizer, Path(folder), max_length, max_documents)
        evaluation = evaluate(student_model, teacher_model, documents, notes)
    return Comparison(
        student=student.name,
        teacher=Path(teacher).name,
        data=[Path(source).name for source in data],
        max_length=documents.seq_len,
        truncated_documents=documents.num_truncated,
        evaluation=evaluation,
    )


def _named_teacher(path: Path) -> str:
    """Return the teacher of a run."""
    if RunDirectory(path).is_run:
        return open_run(path).teacher
    raise UserError(
        "no teacher is given", "name the original model's directory or hub id: --teacher DIR, or teacher=DIR in Python"
    )


def read_documents(
    sources: list[str], tokenizer, cache_dir: Path, max_length: int, max_documents: int | None = None
) -> PaddedDocuments:
    """Return documents, one per row; `cache_dir` must exist as long as they are used."""
    store = load_tokens(sources, tokenizer, cache_dir=cache_dir)
    if max_documents is not None:
        store = store.select(np.arange(min(max_documents, store.num_documents)))
    return PaddedDocuments(store, max_length)


def evaluate(
    student: PreTrainedModel, teacher: PreTrainedModel, documents: PaddedDocuments, notes: Console
) -> Evaluation:
    """Run `evaluate_models`, with the control of a windowed student, and show its progress on `notes`."""
    batches = document_batches(documents, batch_tokens=min(8192, max(1, LOGITS // teacher.config.vocab_size)))
    control = control_of(student, teacher)
    if notes.quiet:
        return evaluate_models(student, teacher, batches, control=control)
    with Progress("evaluating", len(documents), unit="documents", stream=notes.file) as progress:
        return evaluate_models(student, teacher, batches, control=control, progress=progress.advance)


def control_of(student: PreTrainedModel, teacher: PreTrainedModel) -> Logits | None:
    """Return the logits of a windowed student's control: the teacher, cut to the windows.

    Args:
        student: exported model, or any other.
        teacher: whose attention is cut for the time of a call.

    Returns:
        None where there is no control: a student without a window, or one that is no hybrid.
    """
    windows = windows_in(student.config)
    if not windows:
        return None

    def logits(batch: Batch) -> Tensor:
        implementation = teacher.config._attn_implementation
        batch = batch.to(teacher.device)
        try:
            with cut_to_windows(attend_within_documents(teacher), windows):
                return teacher.get_output_embeddings()(run_backbone(teacher, batch))
        finally:
            teacher.set_attn_implementation(implementation)

    return logits
