"""The nearest stored sentence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import UserError
from ..data import VectorData


class Retrieval:
    """The nearest stored sentence by cosine.

    Args:
        data: with texts.

    Raises:
        UserError: the data has no texts.
    """

    def __init__(self, data: VectorData):
        if data.texts is None:
            raise UserError(f"vectors of {data.card.get('space')} have no texts to retrieve", "embed text to decode")
        self._texts, self._stored = data.texts, F.normalize(data.vectors, dim=-1)

    def decode(self, vectors: Tensor) -> list[str]:
        """Return the nearest sentence of each vector."""
        parts = F.normalize(vectors.float(), dim=-1).split(256)
        nearest = torch.cat([(part @ self._stored.T).argmax(1) for part in parts])
        return [self._texts[i] for i in nearest.tolist()]
