"""Training on the Triton kernels: training_cases.py in the interpreter and on a GPU."""

import pytest
import torch
from triton_worker import run_cases


@pytest.mark.integration
def test_steps_in_the_interpreter():
    run_cases("training_cases.py", interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_steps_on_a_gpu():
    run_cases("training_cases.py", interpret=False)
