"""The Triton kernels of windows over sequences: in the interpreter, on a GPU, and where they do not run."""

import pytest
import torch
from triton_worker import run_cases

from rwkvinside import kernels
from rwkvinside.modeling.window_attention import Form, window_attention


@pytest.mark.integration
def test_windows_in_the_interpreter():
    run_cases("window_cases.py", interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_windows_on_a_gpu():
    run_cases("window_cases.py", interpret=False)


@pytest.mark.parametrize("backend", ["auto", "reference", "chunked", "native", "triton"])
def test_a_cpu_runs_pytorch_code(backend, monkeypatch):
    monkeypatch.setattr(kernels, "window_attention", None)
    q, k, v = torch.randn(1, 9, 4, 8), torch.randn(1, 9, 2, 8), torch.randn(1, 9, 2, 8)
    assert window_attention(q, k, v, Form(4, 1), backend=backend)[0].values.isfinite().all()
