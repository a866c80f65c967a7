"""Phases of a stage: what trains from which step on."""

from __future__ import annotations

from dataclasses import dataclass

from .settings import StageConfig


@dataclass(frozen=True)
class Phase:
    """A part of a stage in which the same parameters train.

    Attributes:
        index: counted from 0.
        first, until: optimizer steps of the stage that are done when it begins and when it ends.
        tokens: those of the stage after which it was to begin; the first step that starts there or later is its first.
        train: all patterns that train in it, including those of the phases before it.
    """

    index: int
    first: int
    until: int
    tokens: int
    train: tuple[str, ...]


def phases_of(settings: StageConfig) -> tuple[Phase, ...]:
    """Return the phases of a stage in order; one where nothing unfreezes.

    Entries of `unfreeze` that fall on one step are one phase.
    """
    starts = {0: (0, list(settings.train))}
    for entry in settings.unfreeze:
        first = -(-entry.at_tokens // settings.length.tokens_per_step)
        starts.setdefault(first, (entry.at_tokens, []))[1].extend(entry.train)
    firsts = sorted(starts)
    train: tuple[str, ...] = ()
    phases = []
    for index, (first, until) in enumerate(zip(firsts, [*firsts[1:], settings.length.steps], strict=True)):
        tokens, patterns = starts[first]
        train += tuple(pattern for pattern in dict.fromkeys(patterns) if pattern not in train)
        phases.append(Phase(index, first, until, tokens, train))
    return tuple(phases)
