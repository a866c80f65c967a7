"""Which machines the compiled kernels say they can run on."""

import pytest
import torch

from rwkvinside import kernels
from rwkvinside.modeling import wkv7_triton


@pytest.mark.parametrize(
    "found, hip, capabilities, reason",
    [
        (False, None, [], "PyTorch finds no GPU"),
        (True, "6.4", [(9, 4)], "made for NVIDIA GPUs"),
        (True, None, [(9, 0), (7, 5)], "compute capability 8.0 or later, and one here has 7.5"),
        (True, None, [(8, 0), (9, 0)], None),
    ],
)
def test_triton(monkeypatch, found, hip, capabilities, reason):
    monkeypatch.setattr(wkv7_triton, "_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
    wkv7_triton.why_unavailable.cache_clear()
    got = kernels.why_unavailable.__wrapped__("triton")
    wkv7_triton.why_unavailable.cache_clear()
    assert got is None if reason is None else reason in got


def test_without_triton(monkeypatch):
    monkeypatch.setattr(wkv7_triton, "triton", None)
    wkv7_triton.why_unavailable.cache_clear()
    assert "pip install triton" in kernels.why_unavailable.__wrapped__("triton")
    wkv7_triton.why_unavailable.cache_clear()


@pytest.mark.parametrize(
    "backend, given, reason",
    [
        ("native", ("cpu", torch.float32, 64), None),
        ("native", ("cuda", torch.float32, 64), "runs on cpu tensors"),
        ("native", ("cpu", torch.float64, 64), "given float64"),
        ("triton", ("cuda", torch.bfloat16, 264), "multiples of 8 from 8 to 256"),
        ("triton", ("cuda", torch.bfloat16, 40), None),
        ("triton", ("cpu", torch.bfloat16, 64), "runs on cuda tensors"),
    ],
)
def test_tensors(monkeypatch, backend, given, reason):
    monkeypatch.setattr(wkv7_triton, "_interpreted", lambda: False)
    got = kernels.why_unsupported(backend, *given)
    assert got is None if reason is None else reason in got
