"""The training benchmark runs on a saved teacher, with every backend that is asked for."""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from rwkvinside.evaluate.training_speed import training_speed


def test_measures_all_kinds_with_every_backend(tmp_path):
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
    result = training_speed(tmp_path, rows=2, seq_len=32, repeats=2, backends=("chunked", "reference"))
    speed = result["tokens_per_second"]
    names = ["finetune", "align chunked", "distil chunked", "align reference", "distil reference"]
    assert list(speed) == names and min(speed.values()) > 0
