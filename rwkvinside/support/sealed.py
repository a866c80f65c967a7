"""JSON that carries a SHA-256 of its own content, so that it is known to be what was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

SEAL = "seal"  # the key of the digest


class ChangedError(ValueError):
    """Sealed values are not those that were written."""


def digest_of(values: object) -> str:
    """Return the SHA-256 of JSON values, in hexadecimal.

    The order of keys does not count; what JSON does not know counts by its text.
    """
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def sealed(values: Mapping) -> dict:
    """Return JSON values with their digest, the last field."""
    return dict(values) | {SEAL: digest_of(dict(values))}


def sealed_text(values: Mapping, indent: int = 1) -> str:
    """Return `sealed` values as text."""
    return json.dumps(sealed(values), indent=indent) + "\n"


def unsealed(text: str) -> dict:
    """Return the values of `sealed`.

    Raises:
        ValueError: it is not sealed JSON; `ChangedError`, it is not what was written.
    """
    try:
        values = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(values, dict) or SEAL not in values:
        raise ValueError("it has no seal")
    if values.pop(SEAL) != digest_of(values):
        raise ChangedError("it was changed after it was written")
    return values


def read_sealed(path: Path) -> tuple[dict, str]:
    """Return what was sealed in a file, and its digest.

    Raises:
        ValueError: says what is wrong with the file, which may be missing.
    """
    try:
        values = unsealed(path.read_text(encoding="utf-8"))
    except ChangedError as error:
        raise ChangedError(f"{path.name} was changed after it was written") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name} cannot be read") from error
    return values, digest_of(values)
