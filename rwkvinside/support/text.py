"""Text for people: counts, bytes, and the word that was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def short_count(number: int) -> str:
    """A count as one writes it in a configuration: 600k, 2500k, 10M, 4097."""
    for size, suffix in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size and number % size == 0:
            return f"{number // size}{suffix}"
    return str(number)


def rounded_count(number: int) -> str:
    """A count to four digits, for people: 1.235 M."""
    for size, suffix in ((10**9, " B"), (10**6, " M"), (10**3, " K")):
        if number >= size:
            return f"{number / size:.4g}{suffix}"
    return str(number)


def rounded_bytes(number: int) -> str:
    """A number of bytes to three digits, for people: 1.23 GiB."""
    for size, suffix in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= size:
            return f"{number / size:.3g} {suffix}"
    return f"{number} bytes"


def did_you_mean(given: str, known: Iterable[str], prefix: str = "") -> str:
    """Return "; did you mean WORD?" with the known word nearest to what was given.

    Args:
        given: what is not known.
        known: the words that are.
        prefix: stands before the word that is shown.

    Returns:
        "" where none is near.
    """
    close = difflib.get_close_matches(given, list(known), n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""
