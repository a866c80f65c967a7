"""What trains when, and how fast: the phases of a stage that unfreezes, its learning-rate groups, and their table."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .config import StageConfig
from .distill.hybrid import GROUPS, TEACHER, HybridModel
from .errors import UserError


@dataclass(frozen=True)
class Phase:
    """A part of a stage in which the same parameters train.

    Args:
        index: counted from 0.
        first, until: optimizer steps of the stage that are done when it begins and when it ends.
        tokens: those of the stage after which it was to begin; the first step that starts there or later is its first.
        train: all patterns that train in it, those of the phases before it included.
    """

    index: int
    first: int
    until: int
    tokens: int
    train: tuple[str, ...]


@dataclass(frozen=True)
class RateGroup:
    """Parameters with one learning rate that began to train together.

    Args:
        rate: learning rate at its peak.
        first: optimizer steps of the stage that were done when they began to train.
        parameters: by canonical name.
    """

    rate: float
    first: int
    parameters: dict[str, nn.Parameter]


def phases(stage: StageConfig) -> list[Phase]:
    """The phases of a stage in order; one where nothing unfreezes. Entries that fall on one step are one phase."""
    tokens_per_step = stage.rows * stage.data.seq_len
    starts = {0: (0, list(stage.train))}
    for entry in stage.unfreeze:
        first = -(-entry.at_tokens // tokens_per_step)
        starts.setdefault(first, (entry.at_tokens, []))[1].extend(entry.train)
    firsts = sorted(starts)
    train: tuple[str, ...] = ()
    found = []
    for index, (first, until) in enumerate(zip(firsts, [*firsts[1:], stage.steps], strict=True)):
        tokens, patterns = starts[first]
        train += tuple(pattern for pattern in dict.fromkeys(patterns) if pattern not in train)
        found.append(Phase(index, first, until, tokens, train))
    return found


def joined(student: HybridModel, stage: StageConfig, phase: Phase) -> set[str]:
    """Canonical names of the parameters that begin to train with a phase; of the first phase: none, all are there."""
    return _begin(student, stage)[phase.index] if phase.index else set()


def rate_groups(student: HybridModel, stage: StageConfig, phase: Phase) -> dict[str, RateGroup]:
    """What trains in a phase, by learning rate and by when it began.

    Returns:
        By label, "mixer" first: "mixer" and "adapters" with optim.lr, "rest" with optim.lr_rest, each pattern of
        optim.rates under its own name; the label of what joined later ends in "@" and the tokens after which it did.

    Raises:
        UserError: a pattern of optim.rates that sets the rate of nothing.
    """
    optim, parameters = stage.optim, student.canonical_parameters()
    claimed = {pattern: student.matching(pattern) for pattern in optim.rates}

    def label_of(name: str) -> str:
        kind = student.group_of(name)[0]
        default = kind if kind in ("mixer", "adapters") else "rest"
        return next((pattern for pattern, names in claimed.items() if name in names), default)

    begin = _begin(student, stage)
    labels = {name: label_of(name) for names in begin for name in names}
    if idle := [pattern for pattern in optim.rates if pattern not in labels.values()]:
        raise UserError(
            f"optim.rates: {idle[0]!r} sets the rate of nothing that the stage trains",
            "leave it out, train what it names, or put it before the pattern that takes its parameters",
        )
    rates = {"mixer": optim.lr, "adapters": optim.lr, "rest": optim.lr_rest} | optim.rates
    order = dict.fromkeys(["mixer", "adapters", *optim.rates, "rest"])
    groups: dict[str, RateGroup] = {}
    for each, names in list(zip(phases(stage), begin, strict=True))[: phase.index + 1]:
        for label in order:
            if members := {name: p for name, p in parameters.items() if name in names and labels[name] == label}:
                later = f"@{short_count(each.tokens)}" if each.index else ""
                groups[label + later] = RateGroup(rates[label], each.first, members)
    return groups


def training_table(student: HybridModel, stage: StageConfig, phase: Phase) -> list[str]:
    """One line for each group of the student: parameters, what of them trains in the phase or later, learning rates.

    Of quantised linear layers the weights before quantisation are counted.
    """
    all_phases = phases(stage)
    begin = _begin(student, stage)
    rate_of = {n: g.rate for g in rate_groups(student, stage, all_phases[-1]).values() for n in g.parameters}
    sizes: dict[str, int] = {}
    parts: dict[str, dict[str, int]] = {}  # by group: parameters by what happens to them
    rates: dict[str, dict[str, None]] = {}

    def add(group: str, state: str, count: int) -> None:
        sizes[group] = sizes.get(group, 0) + count
        states = parts.setdefault(group, {})
        states[state] = states.get(state, 0) + count

    parameters = student.canonical_parameters()
    for each, names in zip(all_phases, begin, strict=True):
        state = "trains" if each.index <= phase.index else f"joins after {short_count(each.tokens)} tokens"
        for name in (name for name in parameters if name in names):
            group = student.group_of(name)[-1]
            add(group, state, parameters[name].numel())
            rates.setdefault(group, {})[f"{rate_of[name]:.3g}"] = None
    for name, layer in student.quantized.items():
        add(student.group_of(f"{name}.weight")[-1], f"frozen in {layer.format}", layer.weight_numel)
    for name in parameters.keys() - rate_of.keys():
        add(student.group_of(name)[-1], "frozen", parameters[name].numel())
    lines = [f"{'group':<12}{'parameters':>12}  {'learning rate':<18}in this stage"]
    for group in (group for group in (*GROUPS, TEACHER) if group in sizes):
        states = [f"{rounded_count(n)} {state}" for state, n in parts[group].items()]
        shown = ", ".join(states if len(states) > 1 else parts[group])
        lines.append(f"{group:<12}{rounded_count(sizes[group]):>12}  {', '.join(rates.get(group, ['-'])):<18}{shown}")
    return lines


def _begin(student: HybridModel, stage: StageConfig) -> list[set[str]]:
    """For each phase the canonical names of what begins to train with it."""
    found: list[set[str]] = []
    for phase in phases(stage):
        names = set().union(*(student.matching(pattern) for pattern in phase.train)).difference(*found)
        if not names:
            raise UserError(
                f"unfreeze: what joins after {short_count(phase.tokens)} tokens trains already", "leave that entry out"
            )
        found.append(names)
    return found


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
