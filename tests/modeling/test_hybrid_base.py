"""Configurations of hybrids: mixers by layer, and what they refuse."""

import pytest
import torch

from rwkvinside.modeling.hybrid_base import attention_of_decoding, mixer_fields
from rwkvinside.modeling.hybrid_qwen3 import HybridQwen3Config
from rwkvinside.modeling.mixer_presets import TimeMixerConfig


def mixer(**changes):
    fields = {"hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "head_size": 8} | changes
    return TimeMixerConfig.from_preset("cxa079", qk_norm=True, **fields)


def config(mixers, **fields):
    values = {"hidden_size": 32, "num_hidden_layers": 4, "rwkv_layers": list(mixers)} | mixer_fields(mixers)
    return HybridQwen3Config(**values | fields)


def test_only_what_differs_is_written_by_layer():
    mixers = {0: mixer(), 2: mixer(rank_gate=24), 3: mixer()}
    made = config(mixers)
    assert made.mixer == mixer().to_dict() and made.mixer_layers == {"2": {"rank_gate": 24}}
    assert {i: made.mixer_config(i) for i in mixers} == mixers
    assert config({1: mixer(), 2: mixer()}).mixer_layers == {}


def test_heads_may_differ_where_no_first_layer_is_read():
    plain = {"value_path": "plain", "key_residual": False}
    mixers = {0: mixer(**plain), 1: mixer(num_heads=2, num_kv_heads=1, **plain)}
    assert config(mixers).mixer_layers == {"1": {"num_heads": 2, "num_kv_heads": 1} | _ranks(mixers)}
    with pytest.raises(ValueError, match=r"layer 1 has \(num_heads, num_kv_heads, head_size\) \(4, 1, 8\) and layer 0"):
        config({0: mixer(), 1: mixer(num_kv_heads=1)})


def _ranks(mixers):
    one, two = (mixers[i].to_dict() for i in (0, 1))
    return {name: two[name] for name in one if name.startswith("rank_") and one[name] != two[name]}


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"rwkv_layers": [0, 4]}, "layers 0 to 3"),
        ({"rwkv_layers": [2, 0]}, "ascending"),
        ({"mixer": None}, "needs the field mixer"),
        ({"mixer_layers": {"1": {"rank_gate": 8}}}, r"mixer_layers has \['1'\]"),
        ({"mixer_layers": {"2": {"rank": 8}}}, "unknown mixer fields"),
    ],
)
def test_refusals(fields, said):
    with pytest.raises(ValueError, match=said):
        config({0: mixer(), 2: mixer()}, **fields)


def test_one_token_is_kept_from_attention_that_plans_for_every_length():
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    before = enabled()
    with attention_of_decoding(torch.device("cuda")):
        assert not enabled() and torch.backends.cuda.flash_sdp_enabled()
    assert enabled() == before
    with attention_of_decoding(torch.device("cpu")):
        assert enabled() == before
