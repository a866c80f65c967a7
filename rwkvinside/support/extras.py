"""Libraries that only some uses need, imported when they are."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ..errors import UserError


def import_extra(name: str, purpose: str, instead: str = "") -> Any:
    """Return a library that the installation may do without.

        wandb = import_extra("wandb", "the logger of that name", "or leave it out of loggers")

    Args:
        name: of the module, which pip knows by the same name.
        purpose: what needs it.
        instead: what to do without it.

    Raises:
        UserError: it is not installed, or cannot be imported on this machine.
    """
    try:
        return import_module(name)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == name
        why = "is not installed" if missing else f"cannot be imported: {error}"
        raise UserError(
            f"{purpose} needs {name}, which {why}", f"pip install {name}{instead and f'; {instead}'}"
        ) from error
