"""The Triton decode steps, of the recurrence and of a whole mixer: in the interpreter, on a GPU, what they refuse."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rwkvinside.kernels.gpu.decode import plan_step

CASES = [Path(__file__).with_name(name) for name in ("decode_cases.py", "mixer_step_cases.py")]


def run_cases(cases: Path, interpret: bool):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


@pytest.mark.integration
@pytest.mark.parametrize("cases", CASES, ids=lambda path: path.stem)
def test_properties_in_the_interpreter(cases):
    run_cases(cases, interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cases", CASES, ids=lambda path: path.stem)
def test_properties_on_a_gpu(cases):
    run_cases(cases, interpret=False)


def token(B=2, H=4, N=64, G=None):
    """Arguments of the step on the meta device."""
    full, shared = (torch.empty(B, heads, N, device="meta") for heads in (H, G or H))
    return {
        "r": full,
        "w": full,
        **dict.fromkeys("kvab", shared),
        "state": torch.empty(B, H, N, N, device="meta"),
        "mask": None,
    }


def test_the_largest_batch_fits_a_grid():
    """A grid's first axis may have 2^31 - 1 programs, the others only 65535."""
    [launch], y = plan_step(**token(B=512, H=128), capability=(9, 0))
    assert y.shape == (512, 128, 64)
    assert len(launch.grid) == 1 and 512 * 128 <= launch.grid[0] < 2**31


@pytest.mark.parametrize(
    "change, message",
    [
        ({"r": torch.empty(2, 4, 12)}, "multiple of 8"),
        ({"r": torch.empty(2, 4, 264)}, "multiple of 8"),
        ({"r": torch.empty(2, 1, 4, 64)}, "r has shape"),
        ({"w": torch.empty(2, 2, 64)}, "w has shape"),
        ({"k": torch.empty(2, 3, 64)}, "k has shape"),
        ({"v": torch.empty(1, 4, 64)}, "v has shape"),
        ({"state": torch.empty(2, 4, 64, 64, dtype=torch.bfloat16)}, "float32"),
        ({"state": torch.empty(2, 4, 64, 64).mT}, "contiguous"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, "mask has shape"),
        ({"mask": torch.ones(2)}, "mask has shape"),
    ],
)
def test_refusals_name_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        plan_step(**token() | change, capability=None)
