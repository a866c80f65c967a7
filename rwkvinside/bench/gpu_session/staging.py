"""A folder from which the whole package can be imported, made of a working tree in which it is not installed.

`kernels/wkv7` and `configs` become `rwkvinside.kernels` and `rwkvinside.recipes` by installation only (setup.py).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2]
MAPPED = {"kernels": PACKAGE.parent / "kernels" / "wkv7", "recipes": PACKAGE.parent / "configs"}


@contextmanager
def importable() -> Iterator[Path]:
    """Yield a working directory in which `python -m rwkvinside...` finds every module.

    It is the folder of the installed package, or a temporary one of links.
    """
    if find_spec("rwkvinside.kernels") is not None:
        yield PACKAGE.parent
        return
    with tempfile.TemporaryDirectory(prefix="rwkvinside-") as folder:
        package = Path(folder, PACKAGE.name)
        package.mkdir()
        for entry in PACKAGE.iterdir():
            if entry.name != "__pycache__" and entry.name not in MAPPED:
                (package / entry.name).symlink_to(entry)
        for name, target in MAPPED.items():
            (package / name).symlink_to(target)
        yield Path(folder)


def environment(folder: Path, *, dry: bool) -> dict[str, str]:
    """Return the environment of a stage's process.

    Args:
        folder: from `importable`.
        dry: no GPU is seen, and Triton's kernels are interpreted.
    """
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    more = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    return os.environ | more | ({"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"} if dry else {})
