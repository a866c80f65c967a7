"""The dtype in which an export stores each tensor: one rule for writing and for verifying."""

import re

import torch

from ..modeling.hybrid_base import FP32_PARAMETERS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return fp32 for parameters that every model keeps in fp32, else `dtype`.

    Args:
        name: of the tensor in the export.
        dtype: of the export.
    """
    return torch.float32 if any(re.search(pattern, name) for pattern in FP32_PARAMETERS) else dtype
