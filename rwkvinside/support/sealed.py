"""JSON that knows whether it is what was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

SEAL = "seal"


def sealed(values: Mapping, indent: int = 1) -> str:
    """Return JSON values as text with a SHA-256 over them, the last field."""
    return json.dumps(dict(values) | {SEAL: _digest(dict(values))}, indent=indent) + "\n"


def unsealed(text: str) -> dict:
    """Return the values of `sealed`.

    Raises:
        ValueError: it is not JSON, or not the values that were written.
    """
    try:
        values = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(values, dict) or values.pop(SEAL, None) != _digest(values):
        raise ValueError("it is not what was written")
    return values


def _digest(values: dict) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
