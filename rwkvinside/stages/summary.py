"""What a plan says of a stage that trains.

Steps, learning rates, and what trains when.
"""

from __future__ import annotations

from collections.abc import Collection

from ..hybrid.freezing import GROUPS, TEACHER
from ..hybrid.model import HybridModel
from ..support.text import rounded_count, short_count
from .cuda_graphs import uses_graphs
from .param_groups import joining, rate_groups
from .phases import Phase
from .plan import StagePlan


def training_lines(student: HybridModel, plan: StagePlan, loss: list[str]) -> list[str]:
    """Return steps, learning rates, loss and training table of a stage.

    Args:
        loss: the objective's lines on its loss.
    """
    length, optim = plan.length, plan.optim
    groups = rate_groups(student, plan, plan.phases[-1])
    of_label: dict[str, list[float]] = {}
    for group in groups.values():
        of_label.setdefault(group.label, []).append(group.rate)
    peaks = ", ".join(f"{label} {_range(rates)}" for label, rates in of_label.items())
    peaks += f", times {optim.layer_decay:g} from layer to layer down" if optim.layer_decay < 1 else ""
    span = f"between {100 * optim.decay.start:.3g} % and {100 * optim.decay.end:.3g} % of the tokens"
    decay = f"{optim.decay.shape} to {plan.rates.lr_final:.3g} {span}"
    kind = "" if optim.kind == "adamw" else f"{optim.kind}; "
    return [
        f"steps     {length.steps} of {length.rows_per_step} rows ({length.tokens_per_step} tokens), "
        f"{plan.shape.micro_rows} rows at a time on each rank{', as CUDA graphs' * uses_graphs(student, plan)}",
        f"rates     {kind}{peaks}; warm-up {plan.rates.warmup_steps} steps, {decay}, clip {optim.clip:g}",
        *_early_stop_lines(plan),
        *loss,
        *training_table(student, plan, plan.phases[0]),
    ]


def _early_stop_lines(plan: StagePlan) -> list[str]:
    """Return that the stage may end before its last step, where it may."""
    stop, every = plan.settings.early_stop, plan.settings.evaluate_every_tokens
    if stop is None or every is None:
        return []
    by = f" by {stop.min_delta:g} nats" if stop.min_delta else ""
    joined = ", once all has joined" if len(plan.phases) > 1 else ""
    steps = plan.length.steps_for(every)
    counted = "1 evaluation" if stop.patience == 1 else f"{stop.patience} evaluations"
    return [
        f"end       early, when validation has not improved{by} in {counted}{joined}; there is one "
        f"after every {'step' if steps == 1 else f'{steps} steps'} and at checkpoints"
    ]


def _range(rates: Collection[float]) -> str:
    """Return one rate, or the smallest and the largest of several."""
    ends = dict.fromkeys(f"{rate:.3g}" for rate in (min(rates), max(rates)))
    return " to ".join(ends)


def training_table(student: HybridModel, plan: StagePlan, phase: Phase) -> list[str]:
    """Return one line for each group of the student.

    It has the group's parameters, what of them trains in the phase or later, and learning rates. Of quantized linear
    layers the weights before quantization are counted.
    """
    begin = joining(student, plan)
    rate_of = {n: g for g in rate_groups(student, plan, plan.phases[-1]).values() for n in g.parameters}
    sizes: dict[str, int] = {}
    counts: dict[str, dict[str, int]] = {}  # by group: parameters by what happens to them
    rates: dict[str, dict[str, list[float]]] = {}  # by group and label

    def add(group: str, state: str, count: int) -> None:
        sizes[group] = sizes.get(group, 0) + count
        states = counts.setdefault(group, {})
        states[state] = states.get(state, 0) + count

    parameters = student.canonical_parameters()
    for joins, names in zip(plan.phases, begin, strict=True):
        state = "trains" if joins.index <= phase.index else f"joins after {short_count(joins.tokens)} tokens"
        for name in (name for name in parameters if name in names):
            group = student.group_of(name)[-1]
            add(group, state, parameters[name].numel())
            of = rate_of[name]
            rates.setdefault(group, {}).setdefault(of.label, []).append(of.rate)
    for name, layer in student.quantized.items():
        add(student.group_of(f"{name}.weight")[-1], f"frozen in {layer.format}", layer.weight_numel)
    for name in parameters.keys() - rate_of.keys():
        add(student.group_of(name)[-1], "frozen", parameters[name].numel())
    own = {group: ", ".join(dict.fromkeys(map(_range, of.values()))) for group, of in rates.items()}
    width = max(18, *(len(text) + 2 for text in own.values())) if own else 18
    lines = [f"{'group':<12}{'parameters':>12}  {'learning rate':<{width}}in this stage"]
    for group in (group for group in (*GROUPS, TEACHER) if group in sizes):
        states = [f"{rounded_count(n)} {state}" for state, n in counts[group].items()]
        shown = ", ".join(states if len(states) > 1 else counts[group])
        lines.append(f"{group:<12}{rounded_count(sizes[group]):>12}  {own.get(group, '-'):<{width}}{shown}")
    return lines
