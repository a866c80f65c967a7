"""Finding a teacher and its architecture.

A teacher is a preset (`configs/teachers/`), a local directory, or a hub id. Reads configuration files only, no
weights, and imports neither torch nor transformers, so that mistakes show at once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import yaml

from ..errors import UserError
from ..families.registry import FAMILIES, unsupported
from ..support.text import did_you_mean


@dataclass(frozen=True)
class TeacherInfo:
    """A teacher before it is loaded.

    Attributes:
        path: local directory or hub id of the weights.
        preset: contents of the shipped file for it, {} when there is none.
        model_type, hidden_size, num_layers, max_positions, vocab_size: from its Hugging Face configuration.
        local: whether path is a directory of this machine.
    """

    path: str
    preset: dict
    model_type: str
    hidden_size: int
    num_layers: int
    max_positions: int
    vocab_size: int
    local: bool

    @property
    def name(self) -> str:
        """Last part of the path or hub id."""
        return Path(self.path).resolve().name if self.local else self.path.rsplit("/", 1)[-1]


@cache
def variants() -> dict[str, dict]:
    """Return the shipped variants by name: settings that fit a conversion to a machine."""
    return shipped("variants")


@cache
def teachers() -> dict[str, dict]:
    """Return the presets of teachers by name, such as Qwen3-14B.

    Under `recipes` and `variants` a preset has what one of these needs for its model.
    """
    return shipped("teachers")


def shipped(folder: str) -> dict[str, dict]:
    """Return the shipped YAML files of a folder of `configs/` by name."""
    entries = sorted(files("rwkvinside.recipes").joinpath(folder).iterdir(), key=lambda entry: entry.name)
    return {
        entry.name.removesuffix(".yaml"): yaml.safe_load(entry.read_text(encoding="utf-8"))
        for entry in entries
        if entry.name.endswith(".yaml")
    }


def find_teacher(
    name: str, *, revision: str | None = None, fields: dict | None = None, fresh: bool = False
) -> TeacherInfo:
    """Return what is known of the teacher that the user named.

    Args:
        name: directory with a config.json, name of a preset in any case, or hub id, tried in this order.
        revision: of the hub repository.
        fields: its Hugging Face configuration where known; saves the look-up on the hub.
        fresh: there is no teacher: the name is a tokenizer's, and `fields` say all.

    Raises:
        UserError: an unknown name, an unreadable or incomplete configuration, an unsupported architecture.
    """
    if not name.strip():
        raise UserError("teacher is an empty text", f"give a directory, a hub id or a preset: {', '.join(teachers())}")
    if fresh:
        if fields is None:
            raise UserError("teacher.fresh is true without teacher.config", "give the shapes, or use train_rwkv.py")
        return _teacher(name, {}, fields, local=True)
    if (directory := _directory(name)) is not None:
        return _teacher(name, {}, _read(directory / "config.json"), local=True)
    if (preset := _preset(name)) is not None:
        return _teacher(preset["teacher"]["path"], preset, preset["teacher"]["config"], local=False)
    if fields is not None:
        return _teacher(name, {}, fields, local=False)
    return _teacher(name, {}, _read(_hub_config(name, revision)), local=False)


def teacher_path(name: str) -> str:
    """Return where a teacher's weights are, a local directory or a hub id, of whatever architecture.

    Args:
        name: as of `find_teacher`.

    Raises:
        UserError: an unknown name.
    """
    if _directory(name) is not None:
        return name
    if (preset := _preset(name)) is not None:
        return preset["teacher"]["path"]
    _hub_config(name, None)  # says at once what the hub does not have
    return name


def _directory(name: str) -> Path | None:
    """Return the model directory of a name; None: there is nothing at that path."""
    directory = Path(name)
    if (directory / "config.json").is_file():
        return directory
    if directory.exists():
        raise UserError(f"teacher {name} has no config.json", "give a Hugging Face model directory")
    return None


def _preset(name: str) -> dict | None:
    """Return the preset that a name, or its hub id, in any case means."""
    presets = teachers().items()
    return next((p for known, p in presets if name.lower() in (known.lower(), p["teacher"]["path"].lower())), None)


def _hub_config(name: str, revision: str | None) -> Path:
    """Return the configuration of a hub id, fetched if need be."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(
            f"teacher {name!r} is neither a directory nor a preset nor a hub id{did_you_mean(name, teachers())}",
            f"presets: {', '.join(teachers())}; hub ids look like owner/name",
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"teacher {name}: its config.json cannot be fetched from the hub ({type(error).__name__})",
            "check the name, the network and your access to it, or give a local directory",
        ) from error


def _read(file: Path) -> dict:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}", "give a Hugging Face model directory") from error
    if not isinstance(fields, dict):
        raise UserError(f"{file} is not a JSON object", "give a Hugging Face model directory")
    return fields


def _check_original(path: str, fields: dict) -> None:
    """Refuse weights that are quantized already: they would be converted from a rounded model, if they load at all."""
    if (quantized := fields.get("quantization_config")) is None:
        return
    method = quantized.get("quant_method") if isinstance(quantized, dict) else None
    raise UserError(
        f"teacher {path} is already quantized{f' ({method})' if method else ''}",
        "give the original model; quantize.groups and teacher_model.quantize quantize it here",
    )


def _teacher(path: str, preset: dict, fields: dict, local: bool) -> TeacherInfo:
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise unsupported(model_type, f"teacher {path}")

    _check_original(path, fields)

    def size(name: str) -> int:
        value = fields.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
            cause = f"teacher {path}: its configuration has {name} = {value!r:.60}"
            raise UserError(cause, "it must be a positive integer")
        return value

    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "head_dim"):
        if fields.get(name) is not None:
            size(name)
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    for name in ("rope_theta", "factor") if isinstance(rope, dict) else ():
        value = rope.get(name, fields.get(name))
        if value is not None and not (isinstance(value, (int, float)) and 0 < value < float("inf")):
            cause = f"teacher {path}: its configuration has {name} = {value!r:.60} among the rotary settings"
            raise UserError(cause, "it must be a positive number")
    heads, shared = fields.get("num_attention_heads"), fields.get("num_key_value_heads")
    if heads and shared and heads % shared:
        raise UserError(
            f"teacher {path}: its configuration has num_attention_heads = {heads} and num_key_value_heads = {shared}",
            "the first must be a multiple of the second",
        )
    return TeacherInfo(
        path=path,
        preset=preset,
        model_type=model_type,
        hidden_size=size("hidden_size"),
        num_layers=size("num_hidden_layers"),
        max_positions=size("max_position_embeddings"),
        vocab_size=size("vocab_size"),
        local=local,
    )
