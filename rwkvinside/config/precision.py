"""Device, arithmetic and weight types of a run, with "auto" resolved for this machine."""

from __future__ import annotations

import torch

from .schema import Config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def device_and_precision(config: Config) -> tuple[str, str]:
    """The configured device type and precision with "auto" resolved for this machine; the device need not be here."""
    device, precision = config.device, config.precision
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if precision == "auto":
        old = torch.cuda.is_available() and not torch.cuda.is_bf16_supported()
        precision = "bf16" if device == "cuda" and not old else "fp32"
    return device, precision


def teacher_dtype(config: Config, device: str, precision: str) -> torch.dtype:
    """Type in which the teacher is loaded."""
    if config.teacher.dtype != "auto":
        return DTYPES[config.teacher.dtype]
    return torch.bfloat16 if device == "cuda" and precision == "bf16" else torch.float32


def frozen_dtype(config: Config, device: str, precision: str) -> torch.dtype:
    """Type of the frozen weights that are not quantized, once a model is complete: training in fp32 computes in fp32,
    whatever the teacher was loaded in before its layers were quantized."""
    return torch.float32 if precision == "fp32" else teacher_dtype(config, device, precision)
