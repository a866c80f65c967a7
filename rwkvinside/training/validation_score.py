"""How good a student is on validation data: one number, by which the checkpoints of a stage are compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

MEASURES = ("kl", "ce")  # the first that an evaluation has: without a teacher there is no KL


@dataclass(frozen=True)
class Score:
    """One evaluation as one number, lower is better.

    Attributes:
        step: optimizer steps that were done.
        value: in nats.
        measure: which of the `MEASURES`.
        teacher: with which model the student was compared, "" is the original.
    """

    step: int
    value: float
    measure: str
    teacher: str = ""

    @classmethod
    def of(cls, step: int, numbers: Mapping[str, float | str]) -> Score | None:
        """Return the score of an evaluation, None where it has no finite number to compare."""
        for name in MEASURES:
            if name in numbers:
                value = float(numbers[name])
                return cls(step, value, name, str(numbers.get("teacher", ""))) if math.isfinite(value) else None
        return None

    def comparable(self, other: Score) -> bool:
        """Return whether both measure the same."""
        return (self.measure, self.teacher) == (other.measure, other.teacher)
