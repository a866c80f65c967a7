"""Mixers by name, and patterns of layers such as `mamba2*5,attention` or `mamba2|attention`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from ...errors import UserError
from ...support.text import did_you_mean
from .base import Mixer, Place

MIXERS = {
    "rwkv7": "rwkv7:RWKV7",
    "rwkv_gru": "rnn:RWKVGRU",
    "lstm": "rnn:LSTM",
    "gru": "rnn:GRU",
    "mamba2": "mamba2:Mamba2",
    "hyena": "hyena:Hyena",
    "retnet": "retnet:RetNet",
    "s4": "s4:S4",
    "attention": "attention:Attention",
    "linformer": "linformer:Linformer",
    "performer": "performer:Performer",
    "gpt2": "gpt2:GPT2",
}


def mixer_class(kind: str) -> type[Mixer]:
    """Return the class of a mixer.

    Raises:
        UserError: there is none of that name.
    """
    if kind not in MIXERS:
        raise UserError(f"mixer {kind!r} is not known{did_you_mean(kind, MIXERS)}", f"mixers: {', '.join(MIXERS)}")
    module, name = MIXERS[kind].split(":")
    return getattr(import_module(f".{module}", __package__), name)


def build_mixer(kind: str, d_model: int, place: Place = Place(), **options: Any) -> Mixer:  # noqa: B008
    """Return a mixer.

    Args:
        kind: its name.
        d_model: width of its inputs and outputs.
        place: in the model.
        options: of this kind.

    Raises:
        UserError: an unknown kind or option, or sizes that do not fit.
    """
    built = mixer_class(kind)
    known = [name for name in inspect.signature(built).parameters if name not in ("d_model", "place")]
    for name in options:
        if name not in known:
            raise UserError(
                f"model.options.{kind}.{name} is not known{did_you_mean(name, known)}",
                f"options of {kind}: {', '.join(known) or 'none'}",
            )
    try:
        return built(d_model, place, **options)
    except ValueError as error:
        raise UserError(f"{kind}: {error}", "see docs/vectors.md for the options of the architectures") from error


def parse_pattern(pattern: str, layers: int) -> list[str]:
    """Return the kind of every layer: `mamba2*5,attention` over 12 layers is that pattern twice.

    Kinds with a bar between them share a layer, see `mixture`.

    Raises:
        UserError: not a pattern, or an unknown kind.
    """
    kinds: list[str] = []
    for part in pattern.split(","):
        match = re.fullmatch(r"\s*(\w+(?:\|\w+)*)\s*(?:\*\s*([1-9]\d*))?\s*", part)
        if match is None:
            raise UserError(
                f"model.pattern={pattern!r}", "kinds and counts as in mamba2*5,attention or mamba2|attention*2"
            )
        for kind in match[1].split("|"):
            mixer_class(kind)
        kinds += [match[1]] * int(match[2] or 1)
    return [kinds[i % len(kinds)] for i in range(layers)]


def layer_options(options: Mapping[str, Any], nth: int) -> dict[str, Any]:
    """Return the options of the nth layer of a kind: a list gives each layer its own value, in turn."""
    return {name: value[nth % len(value)] if isinstance(value, list) else value for name, value in options.items()}
