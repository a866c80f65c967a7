"""The generation benchmark at tiny sizes: what a GPU runs at large ones."""

import json

import pytest
import torch
from transformers import Qwen3Config

from rwkvinside.bench.generation import generation_speed, random_models
from rwkvinside.cli.main import main

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, head_dim=16)
CONFIG = Qwen3Config(**SIZES, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def models():
    kept = {"all RWKV": [], "one kept": [1]}
    return random_models(CONFIG, kept, preset="cxa079", dtype=torch.float32, device="cpu")


def test_measures_every_model_context_and_batch(models):
    found = list(generation_speed(models, [8, 16], [1, 2], new_tokens=4))
    assert [(s.batch, s.context, s.model) for s in found] == [
        (batch, context, model) for batch in (1, 2) for context in (8, 16) for model in models
    ]
    assert all(min(s.prefill_seconds, s.eager_ms, s.graphed_ms) > 0 and s.peak_bytes is None for s in found)


def test_bytes_of_the_cache(models):
    state, keys_and_values = 4 * 2 * 16 * 16, 4 * 2 * 16
    found = {(s.model, s.context): s.cache_bytes for s in generation_speed(models, [8, 16], [2], new_tokens=1)}
    for context in (8, 16):
        per_layer = 2 * context * keys_and_values
        assert found["teacher", context] == 3 * per_layer
        assert found["one kept", context] == per_layer + 2 * 2 * state
        assert found["all RWKV", context] == 3 * 2 * state


def test_random_models_keep_in_fp32_what_exports_do():
    models = random_models(CONFIG, {"hybrid": [0]}, preset="cxa079", dtype=torch.bfloat16, device="cpu")
    for name, parameter in models["hybrid"].named_parameters():
        assert (parameter.dtype == torch.float32) == (name.rsplit(".", 1)[-1] in ("w0", "a0", "v0", "k0")), name
    assert models["hybrid"].config.rwkv_layers == [1, 2] and "self_attn.w0" in str(list(models["hybrid"].state_dict()))


def test_the_command_measures_random_models(tmp_path):
    asked = ["--random", "4,2,16", "--contexts", "8", "--new-tokens", "2", "--json", str(tmp_path / "speed.json")]
    assert main(["bench", "generation", *asked]) == 0
    found = json.loads((tmp_path / "speed.json").read_text())
    assert [entry["model"] for entry in found] == ["teacher", "all RWKV", "every fourth kept"]
    assert all(entry["graphed_ms"] > 0 for entry in found)


def test_the_command_measures_directories_and_presets(tmp_path, models, monkeypatch, capsys):
    models["teacher"].save_pretrained(tmp_path / "teacher")
    asked = ["--contexts", "8", "--new-tokens", "2", "--json", str(tmp_path / "speed.json")]
    preset = {"teacher": {"path": str(tmp_path / "teacher")}}  # stands for a hub id, of which there is no copy here
    monkeypatch.setattr("rwkvinside.config.teacher_lookup.teachers", lambda: {"Qwen3-0.6B": preset})
    for name in (str(tmp_path / "teacher"), "qwen3-0.6b"):
        assert main(["bench", "generation", "--models", name, *asked]) == 0
        assert [entry["context"] for entry in json.loads((tmp_path / "speed.json").read_text())] == [8]
    assert main(["bench", "generation", "--models", "Qwen3-0.6", *asked]) == 2
    assert "did you mean Qwen3-0.6B?" in capsys.readouterr().err
