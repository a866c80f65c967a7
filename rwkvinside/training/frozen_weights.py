"""What a stage computes once from the weights it starts with and never changes (quantized weights, say): one file
beside its checkpoints, written before the first step, so that a resumed run and an export do not compute it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UserError
from .checkpoint import MARGIN, flush, free_bytes, measure

NAME = "frozen.safetensors"


def write_frozen_weights(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors of a stage, complete or not at all; only one process may.

    Raises:
        UserError: no space, or the directory cannot be written.
    """
    target, partial = directory / NAME, directory / f".{NAME}.writing"
    needed = sum(t.numel() * t.element_size() for t in tensors.values()) + MARGIN
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if (free := free_bytes(directory)) < needed:
            raise OSError(f"{needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, partial)
        flush(partial)
        partial.replace(target)
        flush(directory)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot write {target}: {error}", "free space or move --out, then --resume") from error


def read_frozen_weights(directory: Path) -> dict[str, Tensor] | None:
    """The tensors of a stage on the CPU; None where it has written none.

    Raises:
        UserError: the file is damaged.
    """
    file = directory / NAME
    if not file.exists():
        return None
    try:
        return load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file} is damaged: {error}", "start the stage again in a new run directory") from error


def frozen_weights_digest(directory: Path) -> str | None:
    """SHA-256 of the file, which checkpoints of the stage remember; None where there is none."""
    file = directory / NAME
    return measure(file)["sha256"] if file.exists() else None
