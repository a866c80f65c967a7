"""A state in fewer bytes, in memory and in a file.

What is compressed is every part of floating point: the recurrent state of each head, the last input of a token shift,
keys and values of windows and of attention. Counters and positions are kept as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from ..errors import UserError
from ..support.files import replacing
from ..support.sealed import digest_of, sealed_text, unsealed
from .cache_parts import grows, map_cache, named_parts, plain_values, rows_of, with_plain_values

FORMATS = ("exact", "fp16", "int8")
HEADER = "rwkvinside.state"  # the key of the header in a file's metadata
VERSION = 1
SCALE = ":scale"  # the end of the name of a part's scales
SAMPLES = 1024  # values of a weight that tell a model from another one


@dataclass(frozen=True)
class CompressedState:
    """A state in one of `FORMATS`.

    "fp16" rounds what is wider than 16 bits to 11 significant bits. "int8" keeps a whole number from -127 to 127 for
    each value and an fp32 scale for each row, the last axis of a part: of a recurrent state the N key channels of one
    value channel of one head, of keys and values one token of one head. So N + 4 bytes take the place of 4 N: 0.27 of
    them with heads of 64, 0.38 with heads of 8.

    Attributes:
        format: its name.
        parts: name -> tensor; of "int8" also the scales, name + `SCALE`, of what was rounded.
        skeleton: the cache without values.
        original_bytes: of the state as it was.
    """

    format: str
    parts: Mapping[str, Tensor]
    skeleton: Cache = field(repr=False)
    original_bytes: int

    @classmethod
    def of(cls, state: Cache, format: str = "int8") -> CompressedState:  # noqa: A002
        """Compress a state, which stays as it is.

        Raises:
            UserError: an unknown format, a state before its first token, or values that the format cannot hold (not
                finite; beyond 65504 with "fp16").
        """
        if format not in FORMATS:
            raise UserError(f"the format of a state is {format!r}", f"allowed: {', '.join(FORMATS)}")
        if rows_of(state) is None:
            raise UserError("the state has read nothing yet", "process a token first")
        parts: dict[str, Tensor] = {}
        for name, x in named_parts(state):
            parts |= _compress(name, x.detach(), format)
        size = sum(x.nbytes for _, x in named_parts(state))
        return cls(format, parts, map_cache(state, lambda _, x: x.detach().new_empty(0)), size)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts and scales."""
        return sum(x.nbytes for x in self.parts.values())

    def restore(self) -> Cache:
        """Return a state that a model goes on from, in the dtypes and on the devices that it had."""
        return map_cache(self.skeleton, self._restored)

    def _restored(self, name: str, like: Tensor) -> Tensor:
        x = self.parts[name].to(like.device)
        if (scale := self.parts.get(name + SCALE)) is not None:
            return (x.to(scale.dtype) * scale.to(like.device)).to(like.dtype)
        return x.to(like.dtype, copy=True)

    def save(self, path: str | Path, model: PreTrainedModel, notes: Mapping[str, Any] | None = None) -> None:
        """Write a safetensors file that only the same model reads again.

        Args:
            path: of the file.
            model: whose state it is.
            notes: JSON values to keep with it, such as the conversation so far.

        Raises:
            UserError: the file cannot be written.
        """
        path = Path(path)
        parts = {name: x.contiguous().cpu() for name, x in self.parts.items()}
        header = {
            "version": VERSION,
            "model": model_identity(model),
            "format": self.format,
            "parts": {name: _content(x) for name, x in parts.items()},
            "values": plain_values(self.skeleton),
            "original_bytes": self.original_bytes,
            "notes": dict(notes or {}),
        }
        try:
            with replacing(path) as temporary:
                save_file(parts, temporary, metadata={HEADER: sealed_text(header)})
                temporary.chmod(0o644)  # safetensors writes files that only their owner may read
        except (OSError, SafetensorError) as error:
            raise UserError(f"the state cannot be written to {path}: {error}", "name a writable file") from error

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel) -> tuple[CompressedState, dict[str, Any]]:
        """Read what `save` wrote; returns the state, on the model's device, and the notes.

        Raises:
            UserError: no such file, another kind of file, one that was changed or damaged, or the state of another
                model.
        """
        path = Path(path)
        header, parts = _read(path)
        if header["model"] != model_identity(model):
            raise UserError(f"{path} is the state of another model", "load the model whose state was saved")
        skeleton = with_plain_values(_state_of_one_token(model), header["values"])
        _check_parts(path, parts, skeleton)
        skeleton = map_cache(skeleton, lambda _, x: x.new_empty(0))
        return cls(header["format"], parts, skeleton, header["original_bytes"]), header["notes"]


def model_identity(model: PreTrainedModel) -> str:
    """Return what tells a model from another one: a SHA-256 in hexadecimal.

    It covers the names and shapes of all weights, and `SAMPLES` values of each, evenly spaced: a step of training
    changes nearly all of them. Wherever and however the model was loaded, it is the same, in a given dtype.
    """
    digest = hashlib.sha256(json.dumps([model.config.model_type, getattr(model.config, "rwkv_layers", None)]).encode())
    for name, weight in model.named_parameters():
        values = weight.detach().flatten()[:: max(1, weight.numel() // SAMPLES)]
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(values.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _compress(name: str, x: Tensor, format: str) -> dict[str, Tensor]:  # noqa: A002
    if format == "exact" or not x.is_floating_point() or x.ndim < 2 or x.numel() == 0:
        return {name: x.clone()}
    if not x.isfinite().all():
        raise UserError(f"part {name} of the state has values that are not finite", "reset the state")
    if format == "fp16":
        return {name: _half(name, x) if x.element_size() > 2 else x.clone()}
    wide = x if x.dtype == torch.float64 else x.float()
    scale = wide.abs().amax(-1, keepdim=True) / 127
    rounded = (wide / scale.where(scale > 0, 1)).round().to(torch.int8)
    return {name: rounded, name + SCALE: scale.float()}


def _half(name: str, x: Tensor) -> Tensor:
    if not (half := x.half()).isfinite().all():
        raise UserError(f"part {name} of the state has values beyond fp16's 65504", "use the format int8")
    return half


def _content(x: Tensor) -> str:
    return hashlib.sha256(x.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """Return the checked header and the parts of a file."""
    if not path.is_file():
        raise UserError(f"there is no state at {path}", "name a file that was saved before")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as a state: {error}", "it was cut short, or is another file") from error
    if HEADER not in metadata:
        raise UserError(f"{path} is no saved state", "name a file that was saved by this toolkit")
    try:
        header = unsealed(metadata[HEADER])
    except ValueError as error:
        raise UserError(f"the header of {path} cannot be trusted: {error}", "use another copy of the file") from error
    if header["version"] != VERSION:
        raise UserError(f"{path} has version {header['version']} of the format, and this is {VERSION}", "save it anew")
    if digest_of({name: _content(x) for name, x in parts.items()}) != digest_of(header["parts"]):
        raise UserError(f"the tensors of {path} are not those that were saved", "use another copy of the file")
    return header, parts


@torch.no_grad()
def _state_of_one_token(model: PreTrainedModel) -> Cache:
    """Return a state that has the slots which this model makes."""
    cache = DynamicCache(config=model.config)
    model(torch.zeros(1, 1, dtype=torch.long, device=model.device), past_key_values=cache, use_cache=True)
    return cache


def _check_parts(path: Path, parts: Mapping[str, Tensor], one: Cache) -> None:
    """Refuse parts that do not fit the slots of the model: another window, say."""

    def fits(name: str, like: Tensor) -> bool:
        if (x := parts.get(name)) is None or x.ndim != like.ndim:
            return False
        fixed: Callable[[Tensor], tuple] = lambda t: (*t.shape[1:2], *t.shape[3 if grows(one, name) else 2 :])  # noqa: E731
        return fixed(x) == fixed(like)

    names = {name for name, _ in named_parts(one)} | {name for name in parts if not name.endswith(SCALE)}
    likes = dict(named_parts(one))
    if wrong := sorted(name for name in names if name not in likes or not fits(name, likes[name])):
        raise UserError(
            f"{path} does not fit the model: {', '.join(wrong[:3])}", "load it with the settings it was saved with"
        )
