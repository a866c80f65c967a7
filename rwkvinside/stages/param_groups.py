"""Learning-rate groups of a stage."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from ..errors import UserError
from ..hybrid.model import HybridModel
from ..support.text import short_count
from .phases import Phase
from .plan import StagePlan


@dataclass(frozen=True)
class RateGroup:
    """Parameters with one learning rate that began to train together.

    Attributes:
        label: where the rate comes from, see `rate_groups`.
        rate: learning rate at its peak.
        first: optimizer steps of the stage that were done when they began to train.
        parameters: by canonical name.
    """

    label: str
    rate: float
    first: int
    parameters: dict[str, nn.Parameter]


def joined(student: HybridModel, plan: StagePlan, phase: Phase) -> set[str]:
    """Return the names of what begins to train with a phase.

    None for the first phase, which finds everything in place.
    """
    return joining(student, plan)[phase.index] if phase.index else set()


def rate_groups(student: HybridModel, plan: StagePlan, phase: Phase) -> dict[str, RateGroup]:
    """Return what trains in a phase, by learning rate and by when it began.

    Returns:
        By name, that of "mixer" first. Labels are "mixer" and "adapters" with optim.lr, "rest" with optim.lr_rest, each
        pattern of optim.rates under its own name; the label of what joined later ends in "@" and the tokens after which
        it did. With optim.layer_decay there is a group for each depth; names say how many layers below the last one.

    Raises:
        UserError: a pattern of optim.rates that sets the rate of nothing.
    """
    optim, peaks, parameters = plan.optim, plan.rates, student.canonical_parameters()
    claimed = {pattern: student.matching(pattern) for pattern in optim.rates}

    def label_of(name: str) -> str:
        kind = student.group_of(name)[0]
        default = kind if kind in ("mixer", "adapters") else "rest"
        return next((pattern for pattern, names in claimed.items() if name in names), default)

    begin = joining(student, plan)
    labels = {name: label_of(name) for names in begin for name in names}
    if idle := [pattern for pattern in optim.rates if pattern not in labels.values()]:
        raise UserError(
            f"optim.rates: {idle[0]!r} sets the rate of nothing that the stage trains",
            "leave it out, train what it names, or put it before the pattern that takes its parameters",
        )
    rates = {"mixer": peaks.lr, "adapters": peaks.lr, "rest": peaks.lr_rest}
    rates |= {p: float(r[:-1]) * peaks.lr if isinstance(r, str) else r for p, r in optim.rates.items()}
    depths = depths_of(student, parameters) if optim.layer_decay < 1 else dict.fromkeys(parameters, 0)
    order = dict.fromkeys(["mixer", "adapters", *optim.rates, "rest"])
    groups: dict[str, RateGroup] = {}
    for earlier, names in list(zip(plan.phases, begin, strict=True))[: phase.index + 1]:
        for label in order:
            members = {name: p for name, p in parameters.items() if name in names and labels[name] == label}
            later = label + (f"@{short_count(earlier.tokens)}" if earlier.index else "")
            for depth in sorted({depths[name] for name in members}):
                rate = rates[label] * optim.layer_decay**depth
                part = {name: p for name, p in members.items() if depths[name] == depth}
                groups[f"{later}, {depth} below" if depth else later] = RateGroup(later, rate, earlier.first, part)
    return groups


def depths_of(student: HybridModel, names: Iterable[str]) -> dict[str, int]:
    """Return how many layers are between parameters and the last layer: 0 there and behind it, L for the embedding."""
    count = len(student.family.layers(student.lm))
    embedding, layer_of = student.embedding_names[0], student.family.layer_of
    return {
        name: count if name == embedding else 0 if (layer := layer_of(name)) is None else count - 1 - layer
        for name in names
    }


def joining(student: HybridModel, plan: StagePlan) -> list[set[str]]:
    """Return for each phase the canonical names of what begins to train with it.

    Raises:
        UserError: a phase in which nothing new trains.
    """
    groups: list[set[str]] = []
    for phase in plan.phases:
        matching: set[str] = set().union(*(student.matching(pattern) for pattern in phase.train))
        names = matching.difference(*groups)
        if not names:
            raise UserError(
                f"unfreeze: what joins after {short_count(phase.tokens)} tokens trains already", "leave that entry out"
            )
        groups.append(names)
    return groups
