"""Text for people: counts, bytes and operations, and nearest known words."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any

COUNTS = ((1, ""), (10**3, " K"), (10**6, " M"), (10**9, " B"), (10**12, " T"))
BYTES = ((1, " bytes"), (2**10, " KiB"), (2**20, " MiB"), (2**30, " GiB"), (2**40, " TiB"))
YEAR = 365.25 * 86400  # seconds
FLOP = tuple((1000**i, f" {prefix}FLOP") for i, prefix in enumerate(["", "K", "M", "G", "T", "P", "E", "Z", "Y"]))


def short_count(number: int) -> str:
    """Return a count exactly, as one writes it in a configuration.

    Examples are 600k, 2500k, 10M, 4097.
    """
    for size, suffix in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size and number % size == 0:
            return f"{number // size}{suffix}"
    return str(number)


def rounded_count(number: float) -> str:
    """Return a count to four digits: 987, 1.235 M, 100 B."""
    return _rounded(number, COUNTS, 4)


def rounded_bytes(number: float) -> str:
    """Return a number of bytes to three digits, four from 1000 on.

    Examples are 12 bytes, 1020 KiB, 1.23 GiB.
    """
    return _rounded(number, BYTES, 3)


def rounded_flop(number: float) -> str:
    """Return a number of floating-point operations to three digits: 4.27 GFLOP."""
    return _rounded(number, FLOP, 3)


def rounded_time(seconds: float) -> str:
    """Return a duration to two digits: 0.41 s, 12 s, 3.5 min, 15 h, 2.1 days, 330 years."""
    for size, unit in ((YEAR, "years"), (86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{float(f'{seconds / size:.2g}'):g} {unit}"
    return f"{float(f'{seconds:.2g}'):g} s"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that was probably meant.

    It is found in whatever case it was written; None where none is near.
    """
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return by_lower[close[0]] if close else None


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Return a question for the end of a message, or "".

    It reads "; did you mean `prefix` + the nearest known word?".
    """
    guess = nearest(word, known)
    return "" if guess is None else f"; did you mean {prefix}{guess}?"


def listed(given: Any) -> list:
    """Return a sequence as a list, and a single text, path or mapping as a list of one: its parts are not meant."""
    return [given] if isinstance(given, str | PathLike | Mapping) else list(given)


def spans(numbers: Sequence[int]) -> str:
    """Return ascending whole numbers, runs of them as ranges: 0, 2-4, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _rounded(number: float, units: Sequence[tuple[int, str]], digits: int) -> str:
    """Return a number in the smallest unit in which it stays below the next one.

    It stays so after rounding.
    """
    limits = [*(size for size, _ in units[1:]), math.inf]
    return next(
        text + suffix
        for (size, suffix), limit in zip(units, limits, strict=True)
        if float(text := _fixed(number / size, digits)) * size < limit
    )


def _fixed(value: float, digits: int) -> str:
    """Return a number >= 0 with so many digits.

    It has all digits in front of the point, and is never in scientific notation.
    """
    places = max(0, digits - len(str(int(value))))
    text = f"{value:.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
