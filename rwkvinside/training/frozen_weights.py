"""Weights that a stage computes once and never changes.

Quantized weights are such. They are computed from the weights that a stage starts with, and are in one file next to its
checkpoints, written before the first step, so that a resumed run and an export do not compute them again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UserError
from ..support.files import file_digest, free_bytes, replacing
from ..support.text import rounded_bytes
from .checkpoint import MARGIN

NAME = "frozen.safetensors"


def write_frozen_weights(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors of a stage, complete or not at all.

    Only one process may.

    Raises:
        UserError: there is no space, or the directory cannot be written.
    """
    target = directory / NAME
    needed = sum(t.numel() * t.element_size() for t in tensors.values()) + MARGIN
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if (free := free_bytes(directory)) < needed:
            raise OSError(f"{rounded_bytes(needed)} needed, {rounded_bytes(free)} free")
        with replacing(target) as temporary:
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {target}: {error}", "free space or move --out, then --resume") from error


def read_frozen_weights(directory: Path) -> dict[str, Tensor] | None:
    """Return the tensors of a stage on the CPU.

    None where it has written none.

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
    """Return the SHA-256 of the file; None where there is none.

    Checkpoints of the stage remember it.
    """
    file = directory / NAME
    return file_digest(file) if file.exists() else None
