"""JSON objects that carry the SHA-256 of their own content, so that an edited one is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

SEAL = "sha256"  # the key of the digest


def digest_of(values: object) -> str:
    """Return the SHA-256 of JSON values, in hexadecimal.

    The order of keys does not count; what JSON does not know counts by its text.
    """
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def sealed(content: Mapping) -> dict:
    """Return JSON values with their own digest."""
    return {SEAL: digest_of(content)} | dict(content)


def read_sealed(path: Path) -> tuple[dict, str]:
    """Return what was sealed in a file, and its digest.

    Raises:
        ValueError: says what is wrong with the file, which may be missing.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        digest = content.pop(SEAL)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name} cannot be read") from error
    if digest != digest_of(content):
        raise ValueError(f"{path.name} was changed after it was written")
    return content, digest
