"""Vectors to text, and what makes the text smoother.

| decoder | how | for which vectors |
|---|---|---|
| retrieval | the nearest stored sentence | those of the store's space |
| vec2text | Morris et al. 2023 (arXiv 2310.06816), an extra with weights of its own | mean:gtr-t5-base |
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from .data import VectorData

DECODERS = ("retrieval", "vec2text")
VEC2TEXT_SPACES = ("mean:gtr-t5-base",)  # the encoder's mean, not what sentence-transformers makes of it


class Decoder(Protocol):
    """Anything that makes texts of vectors."""

    def decode(self, vectors: Tensor) -> list[str]:
        """Return a text for each of the vectors (N, d)."""
        ...


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


def build_decoder(name: str, data: VectorData) -> Decoder:
    """Return a decoder for vectors of the space of `data`.

    Raises:
        UserError: an unknown decoder, a space that it cannot decode, or a package that is not installed.
    """
    if name == "retrieval":
        return Retrieval(data)
    if name != "vec2text":
        raise UserError(f"decoder {name!r} is not known", f"decoders: {', '.join(DECODERS)}")
    space = data.card.get("space")
    if space not in VEC2TEXT_SPACES:
        raise UserError(
            f"vec2text cannot decode vectors of {space}",
            f"it was trained on {', '.join(VEC2TEXT_SPACES)}, neither normalized nor through sentence-transformers' "
            "Dense layer: embed with mean:DIR of gtr-t5-base, or use --decoder retrieval",
        )
    if find_spec("vec2text") is None:
        raise UserError("decoder vec2text is not installed", "pip install vec2text, or use --decoder retrieval")
    return Vec2Text()


class Vec2Text:
    """vec2text's corrector for GTR-T5, from the hub or its cache.

    Its weights were not at hand when this was written: only the checks before it have been run (docs/vectors.md).
    """

    STEPS = 20

    def __init__(self) -> None:
        import vec2text

        self._invert, self._corrector = vec2text.invert_embeddings, vec2text.load_pretrained_corrector("gtr-base")

    def decode(self, vectors: Tensor) -> list[str]:
        """Return the inverted texts."""
        return self._invert(embeddings=vectors, corrector=self._corrector, num_steps=self.STEPS)


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


def smooth(texts: Sequence[str], folder: Path, new_tokens: int = 40) -> str:
    """Return what a local causal language model writes after the texts, greedily.

    Args:
        texts: decoded sentences, in order.
        folder: of the model and its tokenizer.
        new_tokens: to write.

    Raises:
        UserError: there is no model.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no model: it has no config.json", "give the directory of a causal model")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = tokenizer(" ".join(texts), return_tensors="pt", return_token_type_ids=False)
    room = getattr(model.config, "max_position_embeddings", 10**9) - new_tokens
    ids = model.generate(**{name: value[:, -room:] for name, value in inputs.items()}, max_new_tokens=new_tokens)
    return tokenizer.decode(ids[0, min(inputs["input_ids"].shape[1], room) :], skip_special_tokens=True)
