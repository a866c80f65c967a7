"""Training on the Triton kernels, in the interpreter and on a GPU; memory that it keeps, in the interpreter."""

import pytest
import torch
from triton_worker import run_cases


@pytest.mark.integration
def test_steps_in_the_interpreter():
    run_cases("training_cases.py", interpret=True)


@pytest.mark.integration
def test_kept_memory_in_the_interpreter():
    run_cases("activation_cases.py", interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_steps_on_a_gpu():
    run_cases("training_cases.py", interpret=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_on_a_gpu():
    run_cases("graph_cases.py", interpret=False)
