"""Numbers about texts that two models write."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rwkvinside.evaluate.generation import compare_generation, writing


def test_repetition_length_and_texts_without_end():
    found = writing([[1, 2, 3, 4, 1, 2, 3, 4], [5, 6]], max_tokens=8)
    assert found.mean_length == 5 and found.no_end == 0.5
    assert found.repetition == pytest.approx(1 / 5)  # 1234 2341 3412 4123 1234


def test_a_model_writes_what_it_writes_and_another_does_not():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.5,
    )  # fmt: skip
    first, second = (LlamaForCausalLM(config).eval() for _ in range(2))
    prompts = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    seen: list[tuple[int, str]] = []
    same = compare_generation(first, first, prompts, [0], 10, lambda *args: seen.append(args))
    assert same.same_texts == 1 and same.student == same.teacher and sum(count for count, _ in seen) == 3
    assert sum(detail == "token 1 of 10" for _, detail in seen) == 2  # of either model
    other = compare_generation(first, second, prompts, [0], 10)
    assert other.same_texts < 1 and other.same_tokens < 10
