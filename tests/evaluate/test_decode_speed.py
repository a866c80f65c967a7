"""decode_speed generates what the model would, reports a median, and allows contexts beyond the config with RoPE."""

import time

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rwkvinside.errors import UserError
from rwkvinside.evaluate.decode_speed import _Decoding, decode_speed


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def test_every_model_and_context_is_reported_beyond_max_position_embeddings(model):
    calls = []
    rows = decode_speed({"a": model, "b": model}, (8, 64), new_tokens=3, progress=lambda: calls.append(1))
    assert [(row.model, row.context) for row in rows] == [("a", 8), ("a", 64), ("b", 8), ("b", 64)]
    assert all(row.milliseconds > 0 and row.prefill_seconds > 0 for row in rows)
    assert len(calls) == 3  # not for the tokens of warm-up


def test_the_median_is_of_the_measured_tokens_only(model, monkeypatch):
    ticks = iter(range(10**6))
    durations = iter([5.0, 100.0, 100.0, 1.0, 3.0, 2.0])  # the prefill, two tokens of warm-up, three measured ones
    clock = {"now": 0.0}

    def perf_counter() -> float:
        if next(ticks) % 2:
            clock["now"] += next(durations)
        return clock["now"]

    monkeypatch.setattr(time, "perf_counter", perf_counter)
    (row,) = decode_speed({"a": model}, (4,), new_tokens=3, warmup_tokens=2)
    assert (row.prefill_seconds, row.milliseconds) == (5.0, 2000.0)


def test_decoding_generates_what_generate_does(model):
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.inference_mode():
        decoding = _Decoding("a", model, ids)
        tokens = [decoding.token.item()]
        for _ in range(5):
            decoding.step()
            tokens.append(decoding.token.item())
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert tokens == expected[0, 5:].tolist()


def test_learned_positions_that_end_are_refused():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=0))
    with pytest.raises(UserError, match="table of 32 positions"):
        decode_speed({"student": gpt2}, (64,), new_tokens=2)
