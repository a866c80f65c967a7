"""The best layers by their scores, exactly, where number, largest gap and longest run are given."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from ..hybrid.layouts import LayerChoice


def best_layers(scores: Sequence[float], choice: LayerChoice, forced: Collection[int] = ()) -> tuple[int, ...] | None:
    """Return the layers with the largest sum of scores that fulfill a choice, ascending.

    Dynamic programming over the layers: for every number kept so far and length of the last run, the best beginning.

    Args:
        scores: of all layers of the model; larger is better.
        choice: number, largest gap, longest run.
        forced: layers that are among them in any case.

    Returns:
        None where no layers fulfill the choice with these.
    """
    limits = {True: choice.max_run, False: choice.max_gap}
    # (number kept, whether the last layer is, length of its run as far as it matters) -> (sum, layers)
    beginnings: dict[tuple[int, bool, int], tuple[float, tuple[int, ...]]] = {(0, False, 0): (0.0, ())}
    for layer, score in enumerate(scores):
        longer: dict[tuple[int, bool, int], tuple[float, tuple[int, ...]]] = {}
        for (kept, before, run), (total, layers) in beginnings.items():
            for keeps in (False, True) if layer not in forced else (True,):
                limit = limits[keeps]
                length = 0 if limit is None else run + 1 if keeps is before else 1
                if kept + keeps > choice.keep or limit is not None and length > limit:
                    continue
                state = kept + keeps, keeps, length
                value = total + score if keeps else total
                if state not in longer or value > longer[state][0]:
                    longer[state] = value, (*layers, layer) if keeps else layers
        beginnings = longer
    complete = [found for (kept, _, _), found in beginnings.items() if kept == choice.keep]
    return max(complete, key=lambda found: found[0])[1] if complete else None


def greedy_layers(value: Callable[[tuple[int, ...]], float], count: int, choice: LayerChoice) -> list[int]:
    """Return layers in the order in which they raise a value most, each next to those before it.

    Args:
        value: of a set of layers, ascending; asked once for every layer that can follow, in every step.
        count: layers of the model.
        choice: number, largest gap, longest run, which can be fulfilled.
    """
    order: list[int] = []
    for _ in range(choice.keep):
        rest = [i for i in range(count) if i not in order]
        possible = [i for i in rest if best_layers([0.0] * count, choice, {*order, i}) is not None]
        order.append(max(possible, key=lambda i: value(tuple(sorted([*order, i])))))
    return order
