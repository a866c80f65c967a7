"""The Triton kernel of the rotary embedding: in the interpreter and on a GPU."""

import pytest
import torch
from triton_worker import run_cases


@pytest.mark.integration
def test_rotations_in_the_interpreter():
    run_cases("rotation_cases.py", interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rotations_on_a_gpu():
    run_cases("rotation_cases.py", interpret=False)
