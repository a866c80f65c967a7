"""The demo's tokenizer and teacher: exact round trips, a loss that falls, and a cache that knows when it is stale."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rwkvinside.demo import teacher as teacher_module
from rwkvinside.demo.corpus import Corpus
from rwkvinside.demo.teacher import TeacherSettings, learning_rate, obtain_teacher, shuffled_rows, token_rows
from rwkvinside.demo.tokenizer import train_tokenizer

SETTINGS = TeacherSettings(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    tokens=40 * 4 * 32,
    seq_len=32,
    rows_per_step=4,
    warmup_steps=4,
)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    lines = [f"def f{i}(x):\n    return x + {i}\n\n\tété = '日本'\n" for i in range(200)]
    return Corpus(lines[:180], lines[180:])


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_tokenizer(corpus.train, SETTINGS.vocab_size)


def test_any_text_survives_the_tokenizer(tokenizer):
    code = "def f(x):\n    return x\n\n\n"
    for text in (code, "\t \n  a  b", "naïve 日本 🐉", "1234567", "\r\n x  \n", " lead", "trail "):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)


def test_rows_are_the_whole_stream_with_one_token_of_overlap(tokenizer, corpus):
    rows = token_rows(tokenizer, corpus.train, 32)
    stream = [i for text in corpus.train for i in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    assert rows.shape == ((len(stream) - 1) // 32, 33)
    assert rows[:, :-1].flatten().tolist() == stream[: rows.shape[0] * 32]
    assert np.array_equal(rows[:-1, -1], rows[1:, 0])


def test_every_row_comes_once_an_epoch():
    batches = shuffled_rows(np.arange(10)[:, None], 4, seed=0)
    drawn = torch.cat([next(batches) for _ in range(5)]).flatten().tolist()
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]


def test_schedule_warms_up_and_falls_to_two_percent():
    rates = [learning_rate(step, 100, SETTINGS) / SETTINGS.learning_rate for step in range(100)]
    assert rates[0] < 0.26 and max(rates) > 0.97
    assert rates[-1] == pytest.approx(0.02, abs=1e-3)


def test_teacher_learns_is_saved_whole_and_is_kept(tmp_path, corpus, monkeypatch):
    losses = []
    folder = tmp_path / "teacher"
    assert obtain_teacher(folder, SETTINGS, corpus, lambda step, loss: losses.append(loss))
    assert len(losses) == 40
    assert losses[0] == pytest.approx(math.log(300), abs=0.5)
    assert losses[-1] < 0.6 * losses[0]

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert model.config.model_type == "qwen3" and model.config.tie_word_embeddings
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == model.config.vocab_size
    ids = tokenizer(corpus.val[0], return_tensors="pt")["input_ids"]
    assert model(ids, labels=ids).loss.item() < 0.6 * losses[0]  # what is saved is what was trained

    def no_training(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(teacher_module, "train_teacher", no_training)
    assert not obtain_teacher(folder, SETTINGS, corpus, no_training)
    with pytest.raises(AssertionError, match="trained again"):
        obtain_teacher(folder, replace(SETTINGS, seed=1), corpus, no_training)
    with pytest.raises(AssertionError, match="trained again"):
        obtain_teacher(folder, SETTINGS, Corpus(corpus.train[1:], corpus.val), no_training)
    assert (folder / "model.safetensors").is_file()  # the old one stays until the new one is complete
