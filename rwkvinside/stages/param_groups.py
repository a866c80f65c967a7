"""Learning-rate groups of a stage."""

from __future__ import annotations

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
        rate: learning rate at its peak.
        first: optimizer steps of the stage that were done when they began to train.
        parameters: by canonical name.
    """

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
        By label, "mixer" first: "mixer" and "adapters" with optim.lr, "rest" with optim.lr_rest, each pattern of
        optim.rates under its own name; what a pattern of optim.factors names is a group of its own, "mixer x2"; the
        label of what joined later ends in "@" and the tokens after which it did.

    Raises:
        UserError: a pattern of optim.rates or optim.factors that sets the rate of nothing.
    """
    optim, peaks, parameters = plan.optim, plan.rates, student.canonical_parameters()
    claimed = {pattern: student.matching(pattern) for pattern in optim.rates}
    scaled = {pattern: student.matching(pattern) for pattern in optim.factors}

    def factor_of(name: str) -> float:
        return next((optim.factors[pattern] for pattern, names in scaled.items() if name in names), 1.0)

    def label_of(name: str) -> str:
        kind = student.group_of(name)[0]
        default = kind if kind in ("mixer", "adapters") else "rest"
        label = next((pattern for pattern, names in claimed.items() if name in names), default)
        factor = factor_of(name)
        return label if factor == 1 else f"{label} x{factor:g}"

    begin = joining(student, plan)
    labels = {name: label_of(name) for names in begin for name in names}
    used = {label.split(" x")[0] for label in labels.values()}
    idle = [pattern for pattern in optim.rates if pattern not in used]
    idle += [pattern for pattern, names in scaled.items() if names.isdisjoint(labels)]
    if idle:
        raise UserError(
            f"optim.{'rates' if idle[0] in claimed else 'factors'}: {idle[0]!r} sets the rate of nothing that the "
            "stage trains",
            "leave it out, train what it names, or put it before the pattern that takes its parameters",
        )
    rates = {"mixer": peaks.lr, "adapters": peaks.lr, "rest": peaks.lr_rest} | optim.rates
    names_of = ["mixer", "adapters", *optim.rates, "rest"]
    for factor in sorted(set(optim.factors.values()) - {1.0}):
        rates |= {f"{label} x{factor:g}": factor * rates[label] for label in names_of}
    order = dict.fromkeys([*names_of, *rates])
    groups: dict[str, RateGroup] = {}
    for earlier, names in list(zip(plan.phases, begin, strict=True))[: phase.index + 1]:
        for label in order:
            if members := {name: p for name, p in parameters.items() if name in names and labels[name] == label}:
                later = f"@{short_count(earlier.tokens)}" if earlier.index else ""
                groups[label + later] = RateGroup(rates[label], earlier.first, members)
    return groups


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
