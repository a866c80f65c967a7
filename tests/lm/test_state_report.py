"""Bytes of a state by layer, whether they grow, and what compressing it costs."""

import pytest
import torch
from generation_cases import HEAD_SIZE, HEADS, KV_HEADS, VOCAB, build

from rwkvinside.errors import UserError
from rwkvinside.lm.session import StatefulModel
from rwkvinside.lm.state_report import compression_cost, state_growth

RECURRENT = 4 * HEADS * HEAD_SIZE**2
KEY_AND_VALUE = 2 * 4 * KV_HEADS * HEAD_SIZE


def growth(tokens=12, **case):
    model = StatefulModel(build(**case, dtype=torch.float32), chunk_size=5)
    return state_growth(model, tokens)


def test_a_recurrent_state_is_constant():
    found = growth(rwkv_layers=(0, 1, 2, 3))
    assert found.short == found.long and found.grows == []
    assert [(x.recurrent, x.window, x.attention) for x in found.short] == 4 * [(RECURRENT, 0, 0)]


def test_a_window_is_constant():
    found = growth(rwkv_layers=(0, 1, 2, 3), mixer={"window": 6, "sinks": 2})
    assert found.short == found.long and found.grows == []
    assert found.long[2].window == 8 * KEY_AND_VALUE + 8  # and the tokens seen


def test_attention_grows():
    found = growth(rwkv_layers=(0, 2))
    assert found.grows == [1, 3] and found.to_dict()["grows"] == [1, 3]
    assert [x.attention for x in found.short] == [0, 12 * KEY_AND_VALUE, 0, 12 * KEY_AND_VALUE]
    assert [x.attention for x in found.long] == [0, 48 * KEY_AND_VALUE, 0, 48 * KEY_AND_VALUE]


def test_sliding_attention_is_constant_beyond_its_window():
    found = growth(family="mistral", rwkv_layers=(0, 2), sliding_window=6)
    assert found.grows == [] and found.long[1].attention == 5 * KEY_AND_VALUE + 8  # the window's own size


def test_what_compression_costs():
    model = StatefulModel(build(rwkv_layers=(0, 1, 2), dtype=torch.float32))
    ids = [torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(n)) for n in (40, 9, 33)]
    exact, fp16, int8 = compression_cost(model, ids, ("exact", "fp16", "int8"), chunk_size=8)
    assert exact.tokens == fp16.tokens == 31 + 24
    assert exact.kl == 0 and exact.agreement == 1 and exact.ratio == 1
    assert 0 < fp16.kl < int8.kl < 0.1 and int8.agreement > 0.8
    assert 0.49 < fp16.ratio < 0.51 and int8.ratio == pytest.approx((HEAD_SIZE + 4) / (4 * HEAD_SIZE), abs=0.01)
    with pytest.raises(UserError, match="no document is longer than 64 tokens"):
        compression_cost(model, ids, chunk_size=64)


def test_attention_cut_to_a_window_is_constant():
    found = growth(rwkv_layers=(0, 2), attention_window=6, attention_sinks=2)
    assert found.short == found.long and found.grows == []
    assert found.long[1].attention == 8 * KEY_AND_VALUE + 8  # and the tokens seen
