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


def write_frozen_weights(directory: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write the tensors of a stage, complete or not at all.

    Only one process may.

    Returns:
        The SHA-256 of the file, by which it is read.

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
        return file_digest(target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {target}: {error}", "free space or move --out, then --resume") from error


def read_frozen_weights(directory: Path, digest: str | None) -> dict[str, Tensor] | None:
    """Return the tensors of a stage on the CPU.

    Args:
        directory: of the stage.
        digest: what `write_frozen_weights` returned; None: it has written none, and the result is None.

    Raises:
        UserError: the file is missing, or not the one that was written.
    """
    if digest is None:
        return None
    file = directory / NAME
    hint = "restore it from a copy of the run, or begin a new run with --out"
    try:
        if file_digest(file) != digest:
            raise UserError(f"{file} is damaged: its SHA-256 is not the one written", hint)
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {error}", hint) from error
