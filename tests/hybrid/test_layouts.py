"""Layouts: every form, the refusals, and that uniform and measured choices fulfill what they promise."""

from itertools import combinations, product

import pytest

from rwkvinside.hybrid.layouts import LayerChoice, fulfills, resolve_layout, uniform_layers


@pytest.mark.parametrize(
    "layout, layers",
    [
        *((nothing, []) for nothing in (None, [], "none", {})),
        ([11, 0, -1], [0, 11, 29]),
        ("4-6", [4, 5, 6]),
        ([0, "4-6", "-2--1"], [0, 4, 5, 6, 28, 29]),
        ((3,), [3]),
        ({"every": 4}, [3, 7, 11, 15, 19, 23, 27]),
        ({"every": 30}, [29]),
        ({"first": 2, "last": 1}, [0, 1, 29]),
        ({"every": 10, "first": 1, "last": 2, "layers": [9, "12-13"]}, [0, 9, 12, 13, 19, 28, 29]),
        ({"layers": "5-6"}, [5, 6]),
        ("alternating", list(range(1, 30, 2))),
        ("deepstart", list(range(15))),
        ({"pattern": "deepend", "keep": 3}, [27, 28, 29]),
        ({"pattern": "block", "keep": 5}, [2, 3, 6, 7, 10]),
        ({"pattern": "block", "size": 10}, list(range(10, 20))),
        ({"choose": "uniform", "keep": 3}, [9, 19, 29]),
    ],
)
def test_forms(layout, layers):
    assert resolve_layout(layout, 30) == tuple(layers)


@pytest.mark.parametrize(
    "layout, cause",
    [
        ([7, -31, 30], "has layer -31, 30, but there are layers 0 to 29"),
        (["4-30"], "has layer 30, but"),
        ([1, -29, "2-4", 3], "lists layers 1, 3 twice; name each layer once"),
        ("6-4", "has the range 6-4, which ends before it begins"),
        ("0--1", "keeps all 30 layers; leave at least one to convert"),
        ({"every": 1}, "keeps all 30 layers"),
        (5, "must be layers"),
        ([1.5], "has 1.5: name a layer"),
        ([True], "has True: name a layer"),
        ({"evry": 4}, "has the key evry, allowed with these: every, first, last, layers; did you mean every?"),
        ({"every": 0}, "has every = 0: it must be a number from 1 to 30"),
        ({"first": "2"}, "has first = '2'"),
        ({"layers": {}}, "has layers = {}: it must be a list"),
        ({"pattern": "blok"}, "did you mean block?"),
        ({"pattern": "alternating", "keep": 3}, "has the key keep"),
        ({"pattern": "block", "keep": 15, "size": 4}, "keeps 14 layers, not 15"),
        ({"choose": "restor", "keep": 2}, "did you mean restore?"),
        ({"choose": "restore"}, "without keep"),
        ({"choose": "restore", "keep": 31}, "has keep = 31"),
        ({"choose": "restore", "keep": 2, "first": 1}, "has the key first, allowed with these: choose, keep, max_gap"),
        ({"choose": "uniform", "keep": 2, "max_gap": 3}, "has the key max_gap"),
        (
            {"choose": "greedy", "keep": 2, "distill": "1M"},
            "has distill with choose greedy; only restore trains",
        ),
        (
            {"choose": "restore", "keep": 2, "distill": "much"},
            "has distill = 'much': it must be a positive number",
        ),
        ({"choose": "restore", "keep": 4, "max_gap": 3}, "keeps 4 of 30 layers, which max_gap 3 rules out"),
    ],
)
def test_refusals(layout, cause):
    with pytest.raises(ValueError) as error:
        resolve_layout(layout, 30)
    assert cause in str(error.value)


def test_all_may_stay_where_that_is_allowed():
    assert resolve_layout({"every": 1}, 3, allow_all=True) == (0, 1, 2)


def test_without_a_model_only_what_does_not_depend_on_it():
    choice = LayerChoice("restore", 9, max_gap=6)
    for layout in ({"choose": "restore", "keep": 9, "max_gap": 6, "max_run": None}, choice):
        assert resolve_layout(layout, None) == resolve_layout(layout, 30) == choice
    assert resolve_layout([4, 0], None) == (0, 4)
    for layout in ([-1], {"every": 4}, "4-11", {"choose": "uniform", "keep": 3}):
        with pytest.raises(ValueError, match="needs the number of layers"):
            resolve_layout(layout, None)


def test_rounds_of_short_distillations_double():
    choice = resolve_layout({"choose": "restore", "keep": 9, "distill": "100k"}, 30)
    assert choice == LayerChoice("restore", 9, distill=100_000) == resolve_layout(choice, 30)
    assert choice.rounds == (12_500, 25_000, 50_000, 100_000) and choice.method == "restore+distill"
    assert LayerChoice("restore", 9).rounds == () and LayerChoice("restore", 9, distill=1).rounds == (1, 1, 1, 1)


def test_uniform_layers_are_spread():
    for count in range(1, 40):
        for keep in range(1, count + 1):
            layers = uniform_layers(count, keep)
            gaps = {b - a for a, b in zip((-1, *layers), layers, strict=False)}
            assert len(layers) == keep and layers[-1] == count - 1 and max(gaps) - min(gaps) <= 1


def test_a_choice_is_refused_exactly_where_no_layers_fulfill_it():
    for count, gap, run in product(range(2, 8), (None, 1, 2, 3), (None, 1, 2)):
        for keep in range(1, count):
            choice = LayerChoice("restore", keep, gap, run)
            possible = any(fulfills(layers, choice, count) for layers in combinations(range(count), keep))
            try:
                assert resolve_layout(choice, count) == choice and possible
            except ValueError:
                assert not possible, choice
