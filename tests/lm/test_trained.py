"""A tiny model that was trained to repeat what it has read: its state is of use, and of as much use when compressed."""

import pytest
import torch
from generation_cases import build

from rwkvinside.lm.evaluation import evaluate_documents
from rwkvinside.lm.session import StatefulModel
from rwkvinside.lm.state_report import compression_cost

PERIOD, LENGTH, CHUNK = 6, 24, 8


def repeated(rows, seed):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(3, 20, (rows, PERIOD), generator=draw).repeat(1, LENGTH // PERIOD)


@pytest.fixture(scope="module")
def model():
    model = StatefulModel(build(rwkv_layers=(0, 2), dtype=torch.float32), chunk_size=LENGTH // 2)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(50):
        ids = repeated(8, step)
        model.forward_chunked(ids, ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_the_state_is_of_use(model):
    found = evaluate_documents(model, list(repeated(8, 1000)), CHUNK)
    assert found["state_benefit_ratio"] > 1.1 and found["perplexity"] < 20


def test_a_compressed_state_is_of_as_much_use(model):
    fp16, int8 = compression_cost(model, list(repeated(8, 1000)), chunk_size=CHUNK)
    assert 0 < fp16.kl < int8.kl < 1e-3 and int8.agreement > 0.95
