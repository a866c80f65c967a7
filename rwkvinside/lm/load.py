"""Loading what is processed by its state: a model with its tokenizer, and documents as tokens."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config.precision import resolve_device
from ..errors import UserError
from ..evaluate.compare import read_documents
from ..evaluate.load import load_student
from ..runs.directory import RunDirectory
from ..runs.trained import open_run
from ..teacher.load import open_tokenizer
from ..teacher.settings import TeacherConfig


def load_model(path: str | Path, device: str, notes: Console) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model in eval mode and its tokenizer.

    Args:
        path: exported directory, whose model code is run, or run directory.
        device: "auto", "cpu" or "cuda".
        notes: console for what is being loaded.

    Raises:
        UserError: it cannot be loaded; no CUDA device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but PyTorch finds no CUDA device", "use --device cpu")
    model, is_run = load_student(Path(path), resolve_device(device), notes), RunDirectory(path).is_run
    words = open_run(path).base if is_run else TeacherConfig(path=str(path), trust_remote_code=True)
    return model, open_tokenizer(words)


def load_documents(
    sources: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int, max_documents: int
) -> list[Tensor]:
    """Return the token ids of documents, (T,) int64 each, T <= max_length.

    Args:
        sources: files or directories, see `DocumentReader`.
        tokenizer: of the model.
        max_length, max_documents: tokens of a document, and documents from the first on.

    Raises:
        UserError: data that cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        documents = read_documents(list(sources), tokenizer, Path(folder), max_length, max_documents)
        return [torch.from_numpy(documents.row(i)["input_ids"]).long() for i in range(len(documents))]
