"""mlx-lm with an exported model, beside PyTorch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import VerificationError
from ...support.extras import import_extra

PIECES = (17, 1)  # tokens of the first piece that is read through the caches, and of the others
INSTEAD = "on Linux pip install 'mlx[cpu]' mlx-lm; on a Mac it needs Apple silicon"
PURPOSE = "an export for MLX, which is compared with what mlx-lm computes,"


def mlx_lm() -> Any:
    """Return the module of mlx-lm that loads models.

    Raises:
        UserError: it is not installed.
    """
    os.environ.setdefault("MLX_ENABLE_TF32", "0")  # else products of fp32 have 10 bits on some of Apple's GPUs
    for name in ("mlx", "mlx.core", "mlx_lm"):
        import_extra(name, PURPOSE, INSTEAD)
    return import_extra("mlx_lm.utils", PURPOSE)


class Engine:
    """mlx-lm with the model of a directory, in fp32.

    Args:
        folder: of the export.

    Raises:
        VerificationError: mlx-lm does not load it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.mx = folder, import_extra("mlx.core", PURPOSE)
        try:
            self.model, _ = mlx_lm().load_model(folder, trust_remote_code=True)
        except Exception as error:  # whatever its code and that of the families raise
            raise VerificationError(f"mlx-lm does not load {folder}: {error}") from error
        self.model.set_dtype(self.mx.float32)

    def logits(self, ids: Tensor, caches: Any = None) -> Tensor:
        """Return fp32 logits (B, T, V) of token ids (B, T).

        Raises:
            VerificationError: mlx-lm does not compute them.
        """
        try:
            return torch.from_numpy(np.array(self.model(self.mx.array(ids.numpy()), caches).astype(self.mx.float32)))
        except Exception as error:  # whatever the code of the families raises
            raise VerificationError(f"mlx-lm does not run {self.folder}: {error}") from error

    def in_pieces(self, ids: Tensor) -> Tensor:
        """Return the logits of ids that are read piece by piece, from caches."""
        caches, (first, each) = self.model.make_cache(), PIECES
        pieces = [ids[:, :first], *ids[:, first:].split(each, dim=1)]
        return torch.cat([self.logits(piece, caches) for piece in pieces], dim=1)
