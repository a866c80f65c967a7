import pytest
import torch

from rwkvinside.training import throughput as module
from rwkvinside.training.throughput import Throughput, memory_mb


def test_memory_is_that_of_this_process():
    before = memory_mb(torch.device("cpu"))
    block = torch.ones(64_000_000 // 4)
    assert before > 20 and memory_mb(torch.device("cpu")) >= before
    assert block.numel()


def test_throughput_counts_steps_only(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    throughput, found = Throughput(), []
    for seconds in (2.0, 4.0):
        throughput.mark()
        now[0] += seconds
        found.append(throughput.step(tokens=100, steps_left=10))
        now[0] += 1000  # a checkpoint
    assert found == [(50.0, 20.0), (25.0, pytest.approx(10 * (0.9 * 2 + 0.1 * 4)))]
