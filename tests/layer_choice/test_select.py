"""The exact choice against all subsets, and the greedy one against what it promises."""

import random
from itertools import combinations, product

import pytest

from rwkvinside.hybrid.layouts import LayerChoice, fulfills
from rwkvinside.layer_choice.select import best_layers, greedy_layers


@pytest.mark.parametrize("gap, run", [*product((None, 1, 2, 4), (None, 1, 2))])
def test_the_choice_is_the_best_of_all_subsets(gap, run):
    for count, seed in ((1, 0), (4, 1), (7, 2), (9, 3)):
        scores = [random.Random(seed + i).uniform(-1, 1) for i in range(count)]
        for keep in range(1, count + 1):
            for forced in ((), (0,), (count - 1, count // 2)):
                choice = LayerChoice("restore", keep, gap, run)
                allowed = [
                    layers
                    for layers in combinations(range(count), keep)
                    if fulfills(layers, choice, count) and set(forced) <= set(layers)
                ]
                found = best_layers(scores, choice, forced)
                if not allowed:
                    assert found is None
                    continue
                assert found in allowed
                assert sum(scores[i] for i in found) == pytest.approx(max(sum(scores[i] for i in s) for s in allowed))


def test_greedy_sees_what_layers_are_worth_together():
    alone = [3.0, 2.9, 2.0, 0.0, 0.0]
    overlap = {(0, 1): 2.8}  # the second one adds next to nothing

    def value(layers):
        return sum(alone[i] for i in layers) - sum(overlap.get(pair, 0.0) for pair in combinations(layers, 2))

    choice = LayerChoice("greedy", 2)
    assert best_layers(alone, choice) == (0, 1)
    assert greedy_layers(value, 5, choice) == [0, 2]
    assert greedy_layers(value, 5, LayerChoice("greedy", 2, max_gap=1)) == [1, 3], "the only two that leave gaps of one"
    for keep in range(1, 6):
        order = greedy_layers(value, 5, LayerChoice("greedy", keep, max_gap=3))
        assert fulfills(order, LayerChoice("greedy", keep, max_gap=3), 5) and len(set(order)) == keep
