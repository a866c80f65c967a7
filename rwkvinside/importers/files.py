"""Tensors from files that others have written, which may be damaged or contain code."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import UserError
from ..support.weight_index import check_shards
from ..teacher.load import DAMAGED

PICKLED = (".pth", ".pt", ".bin")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a file, or of the shards in a directory, by the names that they have there.

    No code of the file runs: pickles may hold tensors and nothing else.

    Raises:
        UserError: nothing to read, a damaged file, a pickle of something else, a name in two shards.
    """
    tensors: dict[str, Tensor] = {}
    for file in _files(path):
        for name, tensor in _read(file).items():
            if name in tensors:
                raise UserError(f"{path} has {name} twice", "remove the file that does not belong to it")
            tensors[name] = tensor
    return tensors


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights that are no numbers of a trained model.

    Raises:
        UserError: NaN or infinity, or a dtype that is not `FLOATS`.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise UserError(
                f"{path}: {name} is {str(tensor.dtype).removeprefix('torch.')}",
                "weights are float32, bfloat16 or float16; unpack what is quantized",
            )
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path} is damaged: {name} has values that are not finite", "copy it again")


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path} does not exist", "name a .pth or .safetensors file, or a directory of shards")
    check_shards(path)
    for suffix in (".safetensors", *PICKLED):
        if files := sorted(file for file in path.iterdir() if file.suffix == suffix and file.is_file()):
            return files
    raise UserError(f"{path} holds no weights", f"they are in files that end in .safetensors, {', '.join(PICKLED)}")


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with warnings.catch_warnings(action="ignore"):  # of old pickles, which are read or refused
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:  # whose text tells how to run its code
        raise UserError(
            f"{file} is damaged, or not a file of tensors alone",
            "copy it again; code in a pickle is not run: save the state dict alone",
        ) from error
    except DAMAGED as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file} cannot be read: {reason[:160]}", "copy it again") from error
    if not isinstance(content, Mapping) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        raise UserError(
            f"{file} is no mapping of names to tensors", "give the state dict itself, without optimizer or wrapper"
        )
    return {str(name): tensor for name, tensor in content.items()}
