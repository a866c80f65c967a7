"""Who takes part in a talk: a student, and its teacher beside it if that is asked for."""

from __future__ import annotations

from rich.console import Console

from ..config.precision import resolve_device
from ..evaluate.load import load_pretrained
from ..lm.load import load_model
from ..teacher.load import open_tokenizer
from ..teacher.sampling import Sampling
from ..teacher.settings import TeacherConfig
from .conversation import Conversation


def voices_of(
    student: str, teacher: str | None, sampling: Sampling, *, system: str, plain: bool, device: str, notes: Console
) -> dict[str, Conversation]:
    """Load the models and begin a conversation with each.

    Args:
        student: exported directory, whose model code is run, or run directory.
        teacher: directory or hub id; None: the student alone.
        sampling, system, plain: see `Conversation`; without a chat template a conversation is plain.
        device: "auto", "cpu" or "cuda".
        notes: console for what is being loaded.

    Returns:
        Conversations by name, the student last.

    Raises:
        UserError: a model cannot be loaded; no CUDA device.
    """
    model, tokenizer = load_model(student, device, notes)
    voices = {}
    if teacher is not None:
        notes.print(f"loading {teacher}", highlight=False)
        own = open_tokenizer(TeacherConfig(path=teacher))
        original = load_pretrained(teacher, resolve_device(device))
        voices["teacher"] = Conversation(original, own, sampling, system=system, plain=plain or not own.chat_template)
    plain = plain or not tokenizer.chat_template
    return voices | {"student": Conversation(model, tokenizer, sampling, system=system, plain=plain)}
