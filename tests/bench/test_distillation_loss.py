"""`rwkvinside bench head`: both ways give the same loss, and a chunk at a time needs a fraction of the memory."""

import json

import pytest
import torch

from rwkvinside.bench.distillation_loss import Problem, measure
from rwkvinside.cli.main import main


def agree(whole, chunks):
    assert chunks["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert chunks["norm"] == pytest.approx(whole["norm"], rel=1e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_both_ways_agree(trained):
    problem = Problem(tokens=50, vocab=300, hidden=8, trained=trained)
    agree(*(measure(kind, problem, torch.get_num_threads()) for kind in ("whole", "chunks")))


def test_memory_at_a_large_vocabulary(tmp_path, capsys):
    """Needs 7 GiB; a narrow head, because only the time depends on its width."""
    out = tmp_path / "head.json"
    assert main(["bench", "head", "--hidden", "16", "--repeats", "1", "--json", str(out)]) == 0
    assert "331 tokens at a time" in capsys.readouterr().out
    found = json.loads(out.read_text())
    agree(found["whole"], found["chunks"])
    logits = 4 * 2048 * 151936
    assert 4.5 * logits < found["whole"]["bytes"] < 5.5 * logits  # five tensors of that size at once
    assert found["memory"] < 0.1
