"""What a model has read, in a file: its state, the tokens, and the conversation."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from ..errors import UserError
from ..lm.compression import CompressedState
from .conversation import Memory


def write_memory(path: Path, memory: Memory, model: PreTrainedModel) -> int:
    """Write a memory, which stays as it is; return the bytes of the file.

    Raises:
        UserError: nothing was read yet, or the file cannot be written.
    """
    if memory.cache is None:
        raise UserError("there is nothing to keep: nothing was said yet", "say something first")
    notes = {"ids": memory.ids, "text": memory.text, "messages": memory.messages}
    CompressedState.of(memory.cache, "exact").save(path, model, notes)
    return path.stat().st_size


def read_memory(path: Path, model: PreTrainedModel) -> Memory:
    """Return what `write_memory` has written.

    Raises:
        UserError: no such file, a damaged one, or one of another model.
    """
    state, notes = CompressedState.load(path, model)
    if not {"ids", "text", "messages"} <= notes.keys():
        raise UserError(f"{path} is a state without its tokens", "name a file that /save has written")
    return Memory(list(notes["ids"]), state.restore(), notes["text"], list(notes["messages"]))
