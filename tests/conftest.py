"""What all tests share: no network, fixed seeds, and the real teacher and texts where the machine has them."""

import os
import random
import signal
import tempfile
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

# Shells let what they start in the background ignore Ctrl-C, and processes hand that on to what they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Code of exported models: one folder for each process of tests, as transformers imports it from the first that it has.
MODULES = tempfile.TemporaryDirectory(prefix="hf_modules-")
os.environ["HF_MODULES_CACHE"] = MODULES.name

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.make_quick()


# What a test is, where it does not say so itself: by its file or folder, the longest name that fits. All others: unit.
TIERS = {
    "bench": "integration",
    "conversion": "integration",
    "data/test_stream.py": "integration",
    "demo/test_demo.py": "integration",
    "export": "integration",
    "faults/test_kills.py": "integration",
    "faults/test_mutations.py": "integration",
    "faults/test_targets.py": "integration",
    "golden": "integration",
    "hybrid/test_gptq.py": "integration",
    "lm/test_pretrain.py": "integration",
    "modeling/test_generation.py": "integration",
    "modeling/test_graphed_decoding.py": "integration",
    "test_api.py": "integration",
    "test_docs.py": "integration",
    "test_notebooks.py": "integration",
    "test_packaging.py": "integration",
    "vectors/test_decoders.py": "integration",
    "vectors/test_grid.py": "integration",
    "vectors/test_text.py": "integration",
    "vectors/test_train.py": "integration",
}
LONGEST = ("test_docs.py", "planning/test_memory.py", "planning/test_plan.py", "kernels/test_mixer.py")  # minutes each
ORDER = ("distributed", "integration", "gpu", "unit")  # what takes long begins first, so that workers end together


def tier_of(item) -> str:
    """Return the tier of a test: its own marker, or that of its file."""
    if own := next((name for name in ORDER if item.get_closest_marker(name)), None):
        return own
    path = item.path.relative_to(REPOSITORY / "tests").as_posix()
    fits = [prefix for prefix in TIERS if path == prefix or path.startswith(f"{prefix}/")]
    return TIERS[max(fits, key=len)] if fits else "unit"


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    """Mark every test with its tier and put what takes long first."""
    for item in items:
        item.add_marker(tier_of(item))
    long = [REPOSITORY / "tests" / name for name in LONGEST]
    items.sort(key=lambda item: (ORDER.index(tier_of(item)), item.path not in long))


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
