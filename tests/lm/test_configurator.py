"""Layouts of RWKV and attention layers chosen in Python: by index, by pattern, and what is wrong with them."""

import json

import pytest
from transformers import LlamaConfig

from rwkvinside.errors import UserError
from rwkvinside.lm.build import load_lm_config
from rwkvinside.lm.configurator import HybridModelConfigurator


def test_even_layers_are_rwkv_unless_told_otherwise():
    configurator = HybridModelConfigurator(LlamaConfig(num_hidden_layers=6))
    assert configurator.layout == "RARARA"
    assert configurator.configure_layer_architecture().layout == "RARARA"


def test_layers_by_index():
    hybrid_configurator = HybridModelConfigurator(LlamaConfig(num_hidden_layers=5))
    hybrid_configurator.configure_layer_architecture(
        rwkv_layer_indices=[0, 1, 4],
        transformer_layer_indices=[2, 3],
    )
    assert (hybrid_configurator.rwkv_layers, hybrid_configurator.attention_layers) == ((0, 1, 4), (2, 3))
    assert HybridModelConfigurator(4).configure_layer_architecture(rwkv_layer_indices=[3, 1]).layout == "ARAR"
    assert HybridModelConfigurator(4).configure_layer_architecture(transformer_layer_indices=[0]).layout == "ARRR"
    assert HybridModelConfigurator(2).configure_layer_architecture([], [0, 1]).layout == "AA"


@pytest.mark.parametrize(
    "pattern, layout",
    [
        ("alternating", "RARARARA"),
        ("block", "RRAARRAA"),
        ("deepstart", "AAAARRRR"),
        ("deepend", "RRRRAAAA"),
        ({"every": 4}, "RRRARRRA"),
        ([0, -1], "ARRRRRRA"),
        ("2-4", "RRAAARRR"),
    ],
)
def test_patterns_name_the_attention_layers(pattern, layout):
    assert HybridModelConfigurator(8).configure_pattern(pattern).layout == layout


@pytest.mark.parametrize(
    "rwkv, attention, said",
    [
        ([0, 1, 2], [2, 3], "layers 2 are RWKV and attention"),
        ([0], [3], "layers 1-2 are neither"),
        ([0, 4, 7], None, "rwkv_layer_indices has layers 4, 7"),
        (None, [-1], "transformer_layer_indices has layers -1"),
        ([0, 0, 1], [2, 3], "rwkv_layer_indices has layers 0 twice"),
        (["0"], None, "has '0'"),
    ],
)
def test_wrong_indices_are_named_and_change_nothing(rwkv, attention, said):
    configurator = HybridModelConfigurator(4)
    with pytest.raises(UserError, match=said):
        configurator.configure_layer_architecture(rwkv, attention)
    assert configurator.layout == "RARA"


def test_json_there_and_back():
    configurator = HybridModelConfigurator(7).configure_pattern({"first": 1, "every": 3})
    again = HybridModelConfigurator.from_json(configurator.to_json())
    assert (again.layout, again.num_layers) == (configurator.layout, 7)
    contradiction = json.loads(configurator.to_json()) | {"rwkv_layer_indices": [0]}
    with pytest.raises(UserError, match="RWKV and attention"):
        HybridModelConfigurator.from_json(json.dumps(contradiction))
    with pytest.raises(UserError, match="not the JSON of a layout"):
        HybridModelConfigurator.from_json("[]")


def test_a_run_takes_the_layout():
    configurator = HybridModelConfigurator(4).configure_layer_architecture(rwkv_layer_indices=[2, 3])
    assert load_lm_config("tiny", overrides=[configurator.override]).student.attention_layers == (0, 1)


def test_what_has_no_layers_or_measures_them_is_refused():
    with pytest.raises(UserError, match="num_hidden_layers"):
        HybridModelConfigurator({})
    with pytest.raises(UserError, match="measured on a model"):
        HybridModelConfigurator(4).configure_pattern({"choose": "restore", "keep": 2})
    with pytest.raises(UserError, match="no_such"):
        HybridModelConfigurator(4).configure_pattern({"pattern": "no_such"})
