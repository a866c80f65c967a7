"""Device, arithmetic and weight types of a run, with "auto" resolved for this machine."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(asked: str) -> str:
    """Return the type of device to train on; one that is named need not be here."""
    if asked != "auto":
        return asked
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_precision(asked: str, device: str) -> str:
    """Return the arithmetic of the steps, "fp32" or "bf16"."""
    if asked != "auto":
        return asked
    old = torch.cuda.is_available() and not torch.cuda.is_bf16_supported()
    return "bf16" if device == "cuda" and not old else "fp32"


def teacher_dtype(asked: str, device: str, precision: str) -> torch.dtype:
    """Return the type in which the teacher is loaded."""
    if asked != "auto":
        return DTYPES[asked]
    return torch.bfloat16 if device == "cuda" and precision == "bf16" else torch.float32


def frozen_dtype(teacher: torch.dtype, precision: str) -> torch.dtype:
    """Return the type of frozen weights that are not quantized, once a model is complete.

    Training in fp32 computes in fp32, whatever the teacher was loaded in before its layers were quantized.
    """
    return torch.float32 if precision == "fp32" else teacher
