"""What every decoder promises."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Decoder(Protocol):
    """Anything that makes texts of vectors."""

    def decode(self, vectors: Tensor) -> list[str]:
        """Return a text for each of the vectors (N, d)."""
        ...
