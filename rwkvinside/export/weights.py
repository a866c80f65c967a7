"""In which dtype an export stores each tensor: one rule for writing and for verifying."""

import re

import torch

from ..modeling.hybrid_base import FP32_PARAMETERS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """fp32 for the parameters that no model keeps in less, else `dtype`; `name` is the exported name of the tensor."""
    return torch.float32 if any(re.search(pattern, name) for pattern in FP32_PARAMETERS) else dtype
