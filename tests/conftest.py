"""What all tests share: no network, fixed seeds, and the real teacher and texts where the machine has them."""

import os
import random
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
CACHE = REPOSITORY / ".cache"

# Read when the libraries are imported, and inherited by the processes that tests start.
for name, value in {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HOME": str(CACHE / "hf"),
    "TORCH_EXTENSIONS_DIR": str(CACHE / "torch_ext"),
    "TRITON_CACHE_DIR": str(CACHE / "triton"),
    "TORCHINDUCTOR_CACHE_DIR": str(CACHE / "inductor"),
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}.items():
    os.environ.setdefault(name, value)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def _seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Directory with the published teacher and the texts used for real-input tests: `shared` beside the repository."""
    path = REPOSITORY.parent / "shared"
    if not (path / "teachers" / "stories260k").is_dir():
        pytest.skip(f"no real teacher: {path / 'teachers' / 'stories260k'} is missing")
    return path
