"""Which layers of a model keep attention: from what one writes to indices.

    none                        null, [], "none"
    a list                      [0, 11, -1]: -1 is the last layer
    ranges in it, or one alone  "4-11", [0, "4-11", "-2"]: both ends belong to a range
    rules, together their union {every: 4, first: 2, last: 2, layers: [17]}
    a pattern                   {pattern: block, keep: 12, size: 3}, or its name alone
    a count                     {choose: uniform, keep: 9}, or by measurement: {choose: restore, keep: 9, max_gap: 6},
                                {choose: restore, keep: 9, distill: 10M}

`every: N` keeps the last of each group of N layers, as Qwen3-Next and Kimi Linear do: 3, 7, 11, ... for 4; what is
left at the end of a model that N does not divide is recurrent. Patterns are those of models trained from nothing, which
have no attention to keep; `keep` is half of the layers unless it is given:

    alternating                 1, 3, 5, ...: recurrent first, as many as fit
    block                       runs of `size` (2) attention layers, each after equally many recurrent ones
    deepstart, deepend          the first, the last `keep` layers

Pure functions of plain values: neither torch nor a model.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import PydanticCustomError

from ..support.settings import parse_count
from ..support.text import did_you_mean, spans

MEASURED = ("error", "restore", "swap", "greedy")  # in `layer_choice/scores.py`
METHODS = ("uniform", *MEASURED)
RULES = ("every", "first", "last", "layers")
CONSTRAINTS = ("max_gap", "max_run")
DISTILLED = "restore"  # the method that can distill each candidate before it is scored
ROUNDS = 4  # of such distillations at most, each of twice the tokens of the one before
FORMS = "layers ([0, -1]), ranges (4-11), {every: 4}, {first: 2}, {last: 2}, {choose: restore, keep: 9}, or none"


@dataclass(frozen=True)
class LayerChoice:
    """Layers that are still to be chosen, by a measurement on the student.

    Attributes:
        choose: one of `MEASURED`.
        keep: how many layers keep attention.
        max_gap: most recurrent layers in a row, at the ends of the model too; None: any number.
        max_run: most attention layers in a row; None: any number.
        distill: tokens on which each candidate is distilled at most before it is scored; None: none is.
    """

    choose: str
    keep: int
    max_gap: int | None = None
    max_run: int | None = None
    distill: int | None = None

    @property
    def method(self) -> str:
        """The name under which its scores are kept and shown."""
        return self.choose if self.distill is None else f"{self.choose}+distill"

    @property
    def rounds(self) -> tuple[int, ...]:
        """Tokens of the rounds of short distillations, the last one `distill`; () where there are none."""
        return () if self.distill is None else tuple(-(-self.distill // 2**i) for i in reversed(range(ROUNDS)))


Layout = tuple[int, ...] | LayerChoice


def resolve_layout(layout: object, count: int | None, *, allow_all: bool = False) -> Layout:
    """Return the layers that a layout names in a model, ascending, or the choice that is to be made.

    Args:
        layout: see the head of this file.
        count: layers of the model; None: not known, which is enough for indices and for a choice by measurement.
        allow_all: whether all of them may keep attention.

    Raises:
        ValueError: what is wrong, without the name of the setting: a layer that the model does not have, one that is
            named twice, all of them, a form that is none of these.
    """
    if isinstance(layout, LayerChoice):
        layout = vars(layout)
    choosing = isinstance(layout, Mapping) and layout.get("choose") in MEASURED
    if count is None and not choosing and isinstance(layout, Mapping | str) and layout != "none":
        raise ValueError("needs the number of layers of a model: give indices instead")
    if isinstance(layout, Mapping) and "choose" in layout:
        resolved = _choice(layout, count)
    elif isinstance(layout, Mapping) and "pattern" in layout:
        resolved = _pattern(layout, count)
    elif isinstance(layout, Mapping):
        resolved = _rules(layout, count)
    elif isinstance(layout, str) and layout in PATTERNS:
        resolved = _pattern({"pattern": layout}, count)
    elif layout is None or layout == "none":
        resolved = ()
    elif isinstance(layout, Sequence):  # also a text
        resolved = _listed([layout] if isinstance(layout, str) else layout, count)
    else:
        raise ValueError(f"must be {FORMS}")
    kept = resolved.keep if isinstance(resolved, LayerChoice) else len(resolved)
    if kept == count and not allow_all:
        raise ValueError(f"keeps all {count} layers; leave at least one to convert")
    return resolved


def uniform_layers(count: int, keep: int) -> tuple[int, ...]:
    """Return `keep` layers that are spread evenly: the last of each of equally long groups of `count` layers."""
    return tuple((i + 1) * count // keep - 1 for i in range(keep))


def fulfills(layers: Iterable[int], choice: LayerChoice, count: int) -> bool:
    """Return whether layers of a model of `count` fulfill number, largest gap and longest run of a choice."""
    kept = set(layers)
    runs: dict[bool, int] = {True: 0, False: 0}  # the longest ones, of attention and of recurrent layers
    length, before = 0, None
    for i in range(count):
        length = length + 1 if before is (i in kept) else 1
        before = i in kept
        runs[before] = max(runs[before], length)
    limits = {True: choice.max_run, False: choice.max_gap}
    return len(kept) == choice.keep and all(limit is None or runs[kind] <= limit for kind, limit in limits.items())


def _listed(entries: Sequence[object], count: int | None) -> tuple[int, ...]:
    layers: list[int] = []
    below = sys.maxsize if count is None else count
    unknown: list[str] = []
    for entry in entries:
        ends = re.fullmatch(r"(-?\d+)(?:-(-?\d+))?", str(entry).strip()) if type(entry) in (int, str) else None
        if ends is None:
            raise ValueError(f"has {entry!r}: name a layer (3, or -1 for the last) or a range of them (4-11)")
        first, last = int(ends[1]), int(ends[2] or ends[1])
        if outside := [i for i in dict.fromkeys((first, last)) if not (0 if count is None else -below) <= i < below]:
            unknown += map(str, outside)
            continue
        first, last = first % below, last % below
        if first > last:
            raise ValueError(f"has the range {entry}, which ends before it begins")
        layers += range(first, last + 1)
    if unknown and count is None:
        raise ValueError(f"has layer {unknown[0]}, which needs the number of layers of a model: give indices from 0 on")
    if unknown:
        raise ValueError(f"has layer {', '.join(unknown)}, but there are layers 0 to {below - 1} (-1 is the last)")
    if repeated := sorted({i for i in layers if layers.count(i) > 1}):
        named = f"layer {repeated[0]}" if len(repeated) == 1 else f"layers {spans(repeated)}"
        raise ValueError(f"lists {named} twice; name each layer once")
    return tuple(sorted(layers))


def _rules(rules: Mapping, count: int) -> tuple[int, ...]:
    """Return the union of what `every`, `first`, `last` and `layers` keep."""
    _known(rules, RULES)
    kept: set[int] = set()
    for name, value in rules.items():
        if name == "layers":
            kept |= set(_listed([value] if isinstance(value, int | str) else _sequence(name, value), count))
            continue
        number = _number(name, value, count)
        kept |= set(
            {"every": range(number - 1, count, number), "first": range(number)}.get(name, range(count)[-number:])
        )
    return tuple(sorted(kept))


def _alternating(count: int, keep: int, size: int) -> Iterable[int]:
    return range(1, count, 2)


def _block(count: int, keep: int, size: int) -> Iterable[int]:
    return [i for i in range(count) if i // size % 2][:keep]


def _deepstart(count: int, keep: int, size: int) -> Iterable[int]:
    return range(keep)


def _deepend(count: int, keep: int, size: int) -> Iterable[int]:
    return range(count - keep, count)


PATTERNS: dict[str, Callable[[int, int, int], Iterable[int]]] = {
    "alternating": _alternating,
    "block": _block,
    "deepstart": _deepstart,
    "deepend": _deepend,
}
OPTIONS = {"alternating": (), "block": ("keep", "size"), "deepstart": ("keep",), "deepend": ("keep",)}


def _pattern(fields: Mapping, count: int) -> tuple[int, ...]:
    name = fields["pattern"]
    if name not in PATTERNS:
        raise ValueError(f"has pattern {name!r}; there are {', '.join(PATTERNS)}{did_you_mean(str(name), PATTERNS)}")
    _known(fields, ("pattern", *OPTIONS[name]))
    keep, size = (_number(key, fields.get(key, default), count) for key, default in (("keep", count // 2), ("size", 2)))
    layers = tuple(PATTERNS[name](count, keep, size))
    if "keep" in fields and len(layers) < keep:
        raise ValueError(f"keeps {len(layers)} layers, not {keep}: {count} layers have no more blocks of {size}")
    return layers


def _choice(fields: Mapping, count: int | None) -> Layout:
    method = fields["choose"]
    if method not in METHODS:
        raise ValueError(f"has choose {method!r}; there are {', '.join(METHODS)}{did_you_mean(str(method), METHODS)}")
    measured = method in MEASURED
    fields = {name: value for name, value in fields.items() if value is not None}
    if "distill" in fields and method != DISTILLED:
        raise ValueError(f"has distill with choose {method}; only {DISTILLED} trains its candidates")
    own = (*(CONSTRAINTS if measured else ()), *(("distill",) if method == DISTILLED else ()))
    _known(fields, ("choose", "keep", *own))
    if "keep" not in fields:
        raise ValueError(f"has choose {method} without keep, the number of layers that keep attention")
    keep = _number("keep", fields["keep"], count)
    if count is not None and not measured:
        return uniform_layers(count, keep)
    limits = {name: _number(name, fields[name], None) for name in CONSTRAINTS if name in fields}
    distill = _tokens("distill", fields["distill"]) if "distill" in fields else None
    choice = LayerChoice(method, keep, **limits, distill=distill)
    if count is not None and not _can_be_fulfilled(choice, count):
        said = ", ".join(f"{name} {value}" for name, value in limits.items())
        raise ValueError(f"keeps {keep} of {count} layers, which {said} rules out")
    return choice


def _can_be_fulfilled(choice: LayerChoice, count: int) -> bool:
    """Return whether so many layers leave gaps and runs that are short enough."""
    keep, gap, run = choice.keep, choice.max_gap or count, choice.max_run or count
    recurrent = count - keep
    # attention layers cut the recurrent ones into at most keep + 1 gaps, and these the former into as many runs
    return recurrent <= gap * (keep + 1) and keep <= run * (recurrent + 1)


def _known(fields: Mapping, allowed: Sequence[str]) -> None:
    if unknown := [str(name) for name in fields if name not in allowed]:
        more = did_you_mean(unknown[0], allowed)
        raise ValueError(f"has the key {unknown[0]}, allowed with these: {', '.join(allowed)}{more}")


def _number(name: str, value: Any, count: int | None) -> int:
    if type(value) is not int or value < 1 or count is not None and value > count:
        allowed = "1 or more" if count is None else f"a number from 1 to {count}, the layers of the model"
        raise ValueError(f"has {name} = {value!r}: it must be {allowed}")
    return value


def _tokens(name: str, value: Any) -> int:
    try:
        return parse_count(value)
    except PydanticCustomError as error:
        raise ValueError(f"has {name} = {value!r}: it {error.message()}") from None


def _sequence(name: str, value: object) -> Sequence[object]:
    if not isinstance(value, Sequence):
        raise ValueError(f"has {name} = {value!r}: it must be a list of layers and ranges")
    return value
