"""The random state of Python, NumPy and torch as JSON values.

With it a resumed run draws what a straight one would.
"""

from __future__ import annotations

import random

import numpy as np
import torch


def rng_state() -> dict:
    """Return the current states.

    The state of CUDA is that of the current device, absent where CUDA was not used.
    """
    version, values, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    state = {
        "python": [version, list(values), gauss],
        "numpy": numpy | {"state": {"key": numpy["state"]["key"].tolist(), "pos": numpy["state"]["pos"]}},
        "torch": _hex(torch.get_rng_state()),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = _hex(torch.cuda.get_rng_state())
    return state


def set_rng_state(state: dict) -> None:
    """Set what `rng_state` returned.

    A CUDA state is left alone on a machine without CUDA.
    """
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    numpy = state["numpy"]
    key = np.array(numpy["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy | {"state": {"key": key, "pos": numpy["state"]["pos"]}})
    torch.set_rng_state(_tensor(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))


def _hex(state: torch.Tensor) -> str:
    return bytes(state.tolist()).hex()


def _tensor(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
