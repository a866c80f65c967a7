"""The training benchmark runs on a saved teacher and relates what it says it relates."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from rwkvinside.evaluate.training_speed import training_speed


def test_measures_all_three(tmp_path):
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=32,
        vocab_size=40,
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    result = training_speed(tmp_path, rows=2, seq_len=32, repeats=2)
    for name in ("align", "distil"):
        assert result[f"{name}_ratio"] == pytest.approx(result[name] / result["finetune"])
    assert min(result[name] for name in ("finetune", "align", "distil")) > 0
