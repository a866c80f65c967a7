"""Loading what is talked to."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from ..config.precision import resolve_device
from ..errors import UserError
from ..evaluate.load import load_pretrained, load_student
from ..runs.directory import RunDirectory
from ..runs.trained import open_run
from ..teacher.load import open_tokenizer
from ..teacher.settings import TeacherConfig


def load_for_talk(
    path: str, device: str, notes: Console, *, teacher: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model in evaluation mode and its tokenizer.

    Args:
        path: exported directory, whose model code is run, or run directory; of a teacher a directory or hub id.
        device: "auto", "cpu" or "cuda".
        notes: console for what is being loaded.
        teacher: it is one.

    Raises:
        UserError: it cannot be loaded; no CUDA device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but PyTorch finds no CUDA device", "use --device cpu")
    device = resolve_device(device)
    disable_progress_bar()
    if teacher:
        notes.print(f"loading {path}", highlight=False)
        return load_pretrained(path, device), open_tokenizer(TeacherConfig(path=path))
    model = load_student(Path(path), device, notes)
    words = open_run(path).teacher if RunDirectory(path).is_run else path
    return model, open_tokenizer(TeacherConfig(path=words))
