"""The arithmetic of a training step: fp32, or bf16 under autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from ..errors import UserError

PRECISIONS = ("fp32", "bf16")


def check_precision(precision: str) -> None:
    """Refuse what is neither fp32 nor bf16 (`UserError`)."""
    if precision not in PRECISIONS:
        raise UserError(f"precision={precision!r}", f"allowed: {', '.join(PRECISIONS)}")


def precision_context(precision: str, device: torch.device, cache: bool = True) -> AbstractContextManager:
    """Return autocast for "bf16", nothing for "fp32".

    Args:
        precision: one of `PRECISIONS`.
        device: of the products.
        cache: keep the bf16 copy of a weight while the context lasts.
    """
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=cache)
