"""Decoders by name.

| decoder | how | for which vectors |
|---|---|---|
| retrieval | the nearest stored sentence | of the store's space |
| inverter:DIR | a small model of `rwkvinside vectors inverter` writes it | of the space it was trained on |
| corrector:DIR | what the inverter of DIR writes, corrected by embedding it again | of that space, with its embedder |
| vec2text, vec2text:DIR | Morris et al. 2023 (arXiv 2310.06816), an extra with weights of its own | mean:gtr-t5-base |
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ...errors import UserError
from ..converter import Converter
from ..data import VectorData
from ..names import DECODERS
from .base import Decoder
from .corrector import load_corrector
from .inverter import load_inverter
from .retrieval import Retrieval
from .vec2text import load_vec2text


def build_decoder(spec: str, data: VectorData) -> Decoder:
    """Return a decoder for vectors of the space of `data`.

    Raises:
        UserError: an unknown decoder, a space that it cannot decode, or a package or model that is missing.
    """
    kind, _, path = spec.partition(":")
    space = str(data.card.get("space"))
    if spec == "retrieval":
        return Retrieval(data)
    if kind == "inverter" and path:
        return load_inverter(Path(path), space)
    if kind == "corrector" and path:
        return load_corrector(Path(path), data)
    if kind == "vec2text":
        return load_vec2text(Path(path) if path else None, space)
    raise UserError(f"decoder {spec!r} is not known", f"decoders: {', '.join(DECODERS)}")


class Through:
    """A decoder of another space, behind a linear map that is fitted on texts that both spaces have vectors of.

    Args:
        spec: of the decoder.
        data: of the vectors that are decoded.
        other: in the decoder's space.

    Attributes:
        r2: see `Converter`.

    Raises:
        UserError: see `build_decoder`; or the texts are not the same.
    """

    def __init__(self, spec: str, data: VectorData, other: VectorData):
        if data.texts is None or data.texts != other.texts:
            raise UserError(
                f"vectors of {other.card.get('space')} are not of the same texts as those of {data.card.get('space')}",
                "embed the same --source with the same --limit",
            )
        self._decoder = build_decoder(spec, other)
        self._converter = Converter(data.vectors, other.vectors)
        self.r2 = self._converter.r2

    def decode(self, vectors: Tensor) -> list[str]:
        """Return a text for each of the vectors (N, d)."""
        return self._decoder.decode(self._converter(vectors))
