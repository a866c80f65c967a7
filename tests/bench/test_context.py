"""The benchmark of long contexts at tiny sizes."""

import json

import pytest
import torch

from rwkvinside.bench.context import context_cost, equal_models
from rwkvinside.cli.main import main


@pytest.fixture(scope="module")
def models():
    return equal_models(4, 2, 16, window=8, vocab=64, dtype=torch.float32, device="cpu")


def test_models_are_of_one_size(models):
    sizes = {name: model.num_parameters() for name, model in models.items()}
    assert list(sizes) == ["attention", "hybrid", "hybrid, window", "RWKV"]
    column = 3 * 32 * 4
    assert all(abs(size - sizes["attention"]) <= column / 2 for size in sizes.values()), sizes
    assert [getattr(model.config, "rwkv_layers", None) for model in models.values()] == [
        None,
        [0, 2],
        [0, 2],
        [0, 1, 2, 3],
    ]


def test_only_attention_grows(models):
    found = {(r.model, r.context): r for r in context_cost(models, [32, 8], chunk_size=8, new_tokens=2)}
    assert [context for _, context in found] == 4 * [8] + 4 * [32]
    key_and_value, state = 2 * 4 * 16, 4 * 2 * 16 * 16
    for context in (8, 32):
        assert found["attention", context].state_bytes == 4 * context * key_and_value
        assert found["hybrid", context].state_bytes == 2 * (context * key_and_value + state)
        assert found["hybrid, window", context].state_bytes == 2 * (8 * key_and_value + state) + 2 * 8
        assert found["RWKV", context].state_bytes == 4 * state
    assert all(min(r.prefill_seconds, r.token_ms) > 0 for r in found.values())


def test_the_command(tmp_path, capsys, monkeypatch):
    table, picture = tmp_path / "c.json", tmp_path / "c.png"
    asked = [
        "--random",
        "2,1,16",
        "--contexts",
        "8",
        "16",
        "--chunk-size",
        "8",
        "--new-tokens",
        "1",
        "--processor-time",
    ]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert main(["bench", "context", *asked]) == 2 and "one thread" in capsys.readouterr().err
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert main(["bench", "context", *asked, "--json", str(table), "--png", str(picture)]) == 0
    found = json.loads(table.read_text())["found"]
    assert [(r["model"], r["context"]) for r in found] == [
        (name, context) for context in (8, 16) for name in ("attention", "hybrid", "hybrid, window", "RWKV")
    ]
    printed = capsys.readouterr().out
    assert all(f"{row['token_ms']:.2f}" in printed for row in found)
    assert picture.read_bytes().startswith(b"\x89PNG")
