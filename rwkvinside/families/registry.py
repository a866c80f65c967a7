"""The table of teacher families, each imported when asked for.

Imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from .base import Family

# model_type of a Hugging Face configuration -> "module:Class" in this package
FAMILIES = {
    "llama": "llama:Llama",
    "qwen2": "qwen2:Qwen2",
    "qwen3": "qwen3:Qwen3",
    "mistral": "mistral:Mistral",
    "ministral": "ministral:Ministral",
    "smollm3": "smollm3:SmolLM3",
    "granite": "granite:Granite",
    "phi3": "phi3:Phi3",
    "olmo2": "olmo2:Olmo2",
    "qwen3_moe": "qwen3_moe:Qwen3Moe",
    "gemma3_text": "gemma3_text:Gemma3Text",
    "gemma2": "gemma2:Gemma2",
    "glm4": "glm4:Glm4",
}


def find(model_type: str) -> Family:
    """Return the family of a teacher.

    Args:
        model_type: as in its Hugging Face configuration.

    Raises:
        UserError: there is no family of that name.
    """
    if model_type not in FAMILIES:
        raise unsupported(model_type)
    module, _, name = FAMILIES[model_type].partition(":")
    return getattr(import_module(f".{module}", __package__), name)()


def unsupported(model_type: object, teacher: str = "the teacher") -> UserError:
    """Return the refusal of an architecture that has no family here."""
    return UserError(
        f"{teacher} has architecture {model_type!r}, which is not supported",
        f"supported: {', '.join(FAMILIES)}; docs/families.md tells how to add one",
    )
