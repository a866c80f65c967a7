"""Finding a teacher and its architecture: a preset of the shipped recipes, a local directory, or a hub id.

Reads configuration files only, no weights, and imports neither torch nor transformers, so that mistakes show at once.
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
        recipe: contents of the shipped recipe for it, {} when there is none.
        model_type, hidden_size, num_layers, max_positions, vocab_size: from its Hugging Face configuration.
        local: whether path is a directory of this machine.
    """

    path: str
    recipe: dict
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
def recipes() -> dict[str, dict]:
    """The shipped recipes by name, Qwen3-14B and so on; under `variants` what a variant needs for that model."""
    return _shipped("recipes")


@cache
def variants() -> dict[str, dict]:
    """The shipped variants by name: settings for any teacher, laid over its recipe."""
    return _shipped("variants")


def _shipped(folder: str) -> dict[str, dict]:
    entries = sorted(files("rwkvinside.recipes").joinpath(folder).iterdir(), key=lambda entry: entry.name)
    return {
        entry.name.removesuffix(".yaml"): yaml.safe_load(entry.read_text(encoding="utf-8"))
        for entry in entries
        if entry.name.endswith(".yaml")
    }


def find_teacher(given: str, *, revision: str | None = None, fields: dict | None = None) -> TeacherInfo:
    """Resolve what the user called the teacher.

    Args:
        given: directory with a config.json, name of a recipe in any case, or hub id, tried in this order.
        revision: of the hub repository.
        fields: its Hugging Face configuration where known; saves the look-up on the hub.

    Raises:
        UserError: nothing of that name, an unreadable or incomplete configuration, an unsupported architecture.
    """
    directory = Path(given)
    if (directory / "config.json").is_file():
        return _teacher(given, {}, _read(directory / "config.json"), local=True)
    if directory.exists():
        raise UserError(f"teacher {given} holds no config.json", "give a Hugging Face model directory")
    for name, recipe in recipes().items():
        if given.lower() in (name.lower(), recipe["teacher"]["path"].lower()):
            return _teacher(recipe["teacher"]["path"], recipe, recipe["teacher"]["config"], local=False)
    if fields is not None:
        return _teacher(given, {}, fields, local=False)
    if given.count("/") != 1 or given.startswith((".", "/", "~")):
        raise UserError(
            f"teacher {given!r} is neither a directory nor a preset nor a hub id{did_you_mean(given, recipes())}",
            f"presets: {', '.join(recipes())}; hub ids look like owner/name",
        )
    return _teacher(given, {}, _read(_download(given, revision)), local=False)


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(repository, "config.json", revision=revision))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"teacher {repository}: its config.json cannot be had from the hub ({type(error).__name__})",
            "check the name, the network and your access to it, or give a local directory",
        ) from error


def _read(file: Path) -> dict:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}", "give a Hugging Face model directory") from error
    if not isinstance(fields, dict):
        raise UserError(f"{file} holds no JSON object", "give a Hugging Face model directory")
    return fields


def _teacher(path: str, recipe: dict, fields: dict, local: bool) -> TeacherInfo:
    model_type = fields.get("model_type")
    if model_type not in FAMILIES:
        raise unsupported(model_type, f"teacher {path}")
    names = ("hidden_size", "num_hidden_layers", "max_position_embeddings", "vocab_size")
    values = [fields.get(name) for name in names]
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, int) or value < 1:
            raise UserError(
                f"teacher {path}: its configuration has {name} = {value!r}", "it must be a positive integer"
            )
    return TeacherInfo(path, recipe, model_type, *values, local=local)
