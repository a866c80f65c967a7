"""Device, arithmetic and weight types of a run.

"auto" is resolved for this machine.
"""

from __future__ import annotations

import torch

from ..support.system import check_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(setting: str) -> str:
    """Return the type of device to train on.

    A device that is named need not be present on this machine.

    Raises:
        UserError: nothing here runs on it.
    """
    check_device(setting)
    if setting != "auto":
        return setting
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_precision(setting: str, device: str) -> str:
    """Return the arithmetic of the steps, "fp32" or "bf16"."""
    if setting != "auto":
        return setting
    lacks_bf16 = torch.cuda.is_available() and not torch.cuda.is_bf16_supported()
    return "bf16" if device == "cuda" and not lacks_bf16 else "fp32"


def teacher_dtype(setting: str, device: str, precision: str) -> torch.dtype:
    """Return the type in which the teacher is loaded."""
    if setting != "auto":
        return DTYPES[setting]
    return torch.bfloat16 if device == "cuda" and precision == "bf16" else torch.float32


def frozen_dtype(teacher: torch.dtype, precision: str) -> torch.dtype:
    """Return the type of frozen weights once a model is complete.

    Quantized weights are not concerned. Training in fp32 computes in fp32, whatever type the teacher was loaded in
    before its layers were quantized.
    """
    return torch.float32 if precision == "fp32" else teacher
