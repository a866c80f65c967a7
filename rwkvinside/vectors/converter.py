"""From one space of vectors to another."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Converter:
    """A linear map with an offset from one space of vectors to another, fitted on vectors of the same texts.

    What an "embedding adapter" between sentence-transformers and vec2text can be at most: a norm that the first space
    has dropped does not come back, which is what `r2` shows.

    Args:
        source: (N, d) vectors.
        target: (N, e) of the same texts.

    Attributes:
        r2: part of the variance of held-out targets (every fifth text) that the map explains.
    """

    def __init__(self, source: Tensor, target: Tensor):
        held = torch.arange(len(source)) % 5 == 0
        weight = self._fit(source[~held], target[~held])
        rest = target[held] - self._apply(source[held], weight)
        self.r2 = 1 - float(rest.pow(2).sum() / (target[held] - target[~held].mean(0)).pow(2).sum())
        self._weight = self._fit(source, target)

    def __call__(self, vectors: Tensor) -> Tensor:
        """Return vectors (N, e) of the target's space."""
        return self._apply(vectors, self._weight)

    @staticmethod
    def _fit(source: Tensor, target: Tensor) -> Tensor:
        padded = F.pad(source.double(), (0, 1), value=1.0)
        return torch.linalg.lstsq(padded, target.double(), driver="gelsd").solution

    @staticmethod
    def _apply(vectors: Tensor, weight: Tensor) -> Tensor:
        return (F.pad(vectors.double(), (0, 1), value=1.0) @ weight).float()
