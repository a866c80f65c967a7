"""`rwkvinside lm`: what its commands print and write of a saved model."""

import json

import pytest
from tiny import byte_tokenizer, save_qwen3, save_texts

from rwkvinside.cli.main import main


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    save_qwen3(folder / "model", byte_tokenizer("<eos>", eos_token="<eos>"), eos_token_id=256)
    save_texts(folder / "val.jsonl", 6)
    return folder


def test_evaluate(saved, capsys):
    out = saved / "out.json"
    argv = ["lm", "evaluate", saved / "model", "--data", saved / "val.jsonl", "--chunk-size", 32, "--json", out]
    assert main([str(word) for word in argv]) == 0
    result, printed = json.loads(out.read_text()), " ".join(capsys.readouterr().out.split())
    assert result["chunk_size"] == 32 and result["documents"] == 6
    assert (
        f"{result['perplexity']:.4f}" in printed and f"{result['without_state_perplexity']:.4f} without it" in printed
    )
    assert "chunks of 32" in printed and "64-" in printed


def test_state(saved, capsys):
    out = saved / "state.json"
    argv = ["lm", "state", saved / "model", "--tokens", 8, "--data", saved / "val.jsonl", "--chunk-size", 16]
    assert main([str(word) for word in [*argv, "--json", out]]) == 0
    result, printed = json.loads(out.read_text()), " ".join(capsys.readouterr().out.split())
    assert result["growth"]["grows"] == [0, 1, 2] and "layers 0-2 hold keys and values" in printed
    assert [cost["format"] for cost in result["compression"]] == ["fp16", "int8"]
    assert f"{result['compression'][1]['kl']:.2e}" in printed


def test_what_is_refused_is_one_line(saved, capsys):
    argv = ["lm", "evaluate", str(saved / "model"), "--data", str(saved / "val.jsonl")]
    assert main(argv) == 2
    assert "error: no document is longer than a chunk of 1024 tokens" in capsys.readouterr().err
    assert main(["lm", "state", str(saved / "none")]) == 2
    assert "neither an exported model nor a run directory" in capsys.readouterr().err
