"""Configurations of the kernels that are worth trying, and the fastest of those that were measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from ...kernels.gpu.autotune import PARTS
from ...kernels.gpu.launch import Launch
from ...kernels.gpu.table import Config, Key, Tuning, lookup
from .wkv_cases import Capability, Case

AT_ONCE = 8  # choices that are compiled together


class Choice(NamedTuple):
    """Settings of one part of the kernels.

    Attributes:
        length: tokens of a chunk, which all parts share.
        warps, stages, registers: as in `Tuning`.
        rows: of the state, worked on at a time (not in `prepare`).
        columns: worked on at a time (not in the scans).
    """

    length: int
    warps: int
    stages: int = 1
    registers: int | None = None
    rows: int = 16
    columns: int = 16


# The first of each is the table's at one of the sizes. Chunks of 16 tokens were faster than of 32 where both were
# profiled (docs/benchmarks.md), and what has been timed and was slow there is not repeated.
CHOICES: dict[str, list[Choice]] = {
    "prep": [
        *(Choice(16, 2, registers=168, columns=64), Choice(16, 1, columns=64), Choice(16, 1, columns=32)),
        *(
            Choice(16, 2, registers=168, columns=128),
            Choice(16, 2, columns=128),
            Choice(16, 2, registers=200, columns=64),
        ),
        *(Choice(16, 1, registers=168, columns=32), Choice(16, 4, registers=128, columns=128)),
        *(Choice(16, 4, registers=128, columns=64), Choice(16, 2, registers=104, columns=32)),
        *(Choice(16, 1, registers=128, columns=32), Choice(16, 4, registers=168, columns=64)),
        *(Choice(32, 4, columns=64), Choice(32, 8, registers=128, columns=64), Choice(32, 8, columns=128)),
    ],
    "grad": [
        *(Choice(16, 4, registers=128, rows=128, columns=64), Choice(16, 4, registers=128, rows=64, columns=64)),
        *(Choice(16, 1, rows=32, columns=32), Choice(16, 2, registers=168, rows=32, columns=32)),
        *(Choice(16, 2, registers=168, rows=64, columns=32), Choice(16, 2, registers=128, rows=32, columns=32)),
        *(Choice(16, 4, registers=112, rows=128, columns=64), Choice(16, 4, registers=96, rows=128, columns=32)),
        *(Choice(16, 8, registers=64, rows=64, columns=64), Choice(16, 8, registers=128, rows=64, columns=128)),
        *(Choice(16, 2, rows=128, columns=64), Choice(16, 4, registers=112, rows=64, columns=64)),
        *(Choice(16, 4, registers=96, rows=64, columns=32), Choice(16, 8, registers=128, rows=128, columns=128)),
        *(Choice(32, 8, registers=128, rows=64, columns=64), Choice(32, 8, registers=128, rows=128, columns=64)),
    ],
    "scan": [
        *(Choice(16, 4, 3, rows=64), Choice(16, 4, 4, rows=64), Choice(16, 4, 3, rows=32), Choice(16, 2, 3, rows=32)),
        *(Choice(16, 4, 4, rows=32), Choice(16, 2, 4, rows=32), Choice(32, 4, 3, rows=64), Choice(32, 4, 3, rows=32)),
        *(Choice(16, 8, 4, rows=64), Choice(32, 8, 3, rows=64)),
    ],
    "narrow": [
        *(Choice(16, 2, 3), Choice(16, 4, 3), Choice(16, 1, 3), Choice(16, 2, 4)),
        *(Choice(32, 4, 3), Choice(32, 2, 3), Choice(32, 1, 3), Choice(32, 4, 4)),
    ],
}
DRY = [Choice(16, 2, rows=32, columns=32), Choice(16, 2, rows=16, columns=16)]


@dataclass(frozen=True)
class Batch:
    """Configurations that are compiled together, then timed one after another.

    Attributes:
        case: with the table's configuration.
        part: of the kernels, one of `CHOICES`.
        choices: for the part.
        first: number of the first choice among all of the case and part.
    """

    case: Case
    part: str
    choices: list[Choice]
    first: int

    @property
    def name(self) -> str:
        """Part, problem and numbers of the choices."""
        return f"{self.part} {self.case.name} {self.first}-{self.first + len(self.choices) - 1}"

    def configured(self, capability: Capability) -> list[tuple[str, Case]]:
        """Return (words, case) of every choice."""
        return [_configured(self.case, self.part, choice, capability) for choice in self.choices]


def rounds(dry: bool) -> list[list[Batch]]:
    """Return all configurations that are compared, the most valuable first.

    The first round has the first choices of every part, the next ones those that follow.
    """
    if dry:
        return [[Batch(Case(1, 32, 1, 32), part, DRY, 0) for part in ("prep", "grad")]]
    wide, wider = Case(8, 4096, 64, 64), Case(8, 4096, 32, 128)
    small, smaller = Case(1, 4096, 32, 64), Case(1, 4096, 16, 128)
    parts = [*((case, part) for part in ("prep", "grad", "scan") for case in (wide, wider))]
    parts += [(small, "narrow"), (smaller, "narrow")]
    fitting = {
        (case, part): [choice for choice in CHOICES[part] if max(choice.rows, choice.columns) <= case.padded]
        for case, part in parts
    }
    longest = max(map(len, fitting.values()))
    return [
        [
            Batch(case, part, some, first)
            for (case, part), choices in fitting.items()
            if (some := choices[first : first + AT_ONCE])
        ]
        for first in range(0, longest, AT_ONCE)
    ]


def _configured(case: Case, part: str, choice: Choice, capability: Capability) -> tuple[str, Case]:
    tuning = Tuning(choice.warps, choice.stages, choice.registers)
    blocks: dict[str, int] = {
        "prep": {"prep_block_k": choice.columns},
        "grad": {"grad_block_v": choice.rows, "grad_block_k": choice.columns},
        "scan": {"block_v": choice.rows},
        "narrow": {"block_v": min(64, case.padded)},  # so that 16 rows are the narrow ones
    }[part]
    table = lookup(case.padded, capability, case.precision)
    fields: dict = {part: tuning, "length": choice.length, **blocks}
    words = [f"L={choice.length}", f"warps={choice.warps}", f"stages={choice.stages}"]
    words += [f"BV={choice.rows}"] if part != "prep" else []
    words += [f"BK={choice.columns}"] if part in ("prep", "grad") else []
    words += [f"registers<={choice.registers}"] if choice.registers else []
    block_v = 16 if part == "narrow" else None
    return " ".join(words), replace(case, config=replace(table, **fields), block_v=block_v)


def of_part(part: str, launches: list[Launch]) -> list[Launch]:
    """Return the launches that a part decides about."""
    return [launch for launch in launches if launch.kernel.__name__ in PARTS[part]]


class Fastest:
    """The fastest configuration of each part, for each length of chunks."""

    def __init__(self) -> None:
        self._found: dict[tuple[Key, int, str], tuple[float, Config]] = {}

    def add(self, key: Key, part: str, config: Config, ms: float) -> None:
        """Take note of a measurement."""
        place = (key, config.length, part)
        if place not in self._found or ms < self._found[place][0]:
            self._found[place] = (ms, config)

    def table(self) -> Mapping[Key, Config]:
        """Return an entry for each key whose passes are all measured, with the length that makes them fastest."""
        sums: dict[Key, tuple[float, Config]] = {}
        for key, length in dict.fromkeys((key, length) for key, length, _ in self._found):
            parts = {part: self._found.get((key, length, part)) for part in FIELDS}
            needed = [parts[part] for part in ("prep", "grad", "scan")]
            if None in needed:
                continue
            total = sum(ms for ms, _ in filter(None, needed))
            if key not in sums or total < sums[key][0]:
                sums[key] = (total, _joined({part: found[1] for part, found in parts.items() if found}))
        return {key: config for key, (_, config) in sums.items()}


FIELDS = {
    "prep": ("prep", "prep_block_k"),
    "grad": ("grad", "grad_block_v", "grad_block_k"),
    "scan": ("scan", "block_v"),
    "narrow": ("narrow",),
}


def _joined(parts: Mapping[str, Config]) -> Config:
    """Return a configuration with each part's own fields."""
    fields = {name: getattr(config, name) for part, config in parts.items() for name in FIELDS[part]}
    return replace(parts["scan"], **fields)
