"""vec2text (Morris et al. 2023, arXiv 2310.06816): its package and its weights for GTR-T5, neither of them ours.

Both models were trained on the mean of the encoder's hidden states, neither normalized nor sent through
sentence-transformers' Dense layer (vec2text issues 28 and 43), so vectors of any other space are refused. vec2text
0.0.13 was written for transformers 4; what is between it and transformers 5 is done around it here:

- its models load other models while they are built, which `from_pretrained` no longer allows: they are built from their
  configuration, then get their weights (its issue 86);
- its trainers load metrics from the hub that decoding does not use: they get none;
- generation configurations may leave `length_penalty` out, which beam search multiplies with: it is 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from ..embedders import GTR, hub_folder
from ..fitting import load_tensors

SPACES = ("mean:gtr-t5-base",)
HUB = {"inversion": "jxm/gtr__nq__32", "corrector": "jxm/gtr__nq__32__correct"}
STEPS = 20  # of correction; the paper goes to 50
ROWS = 16


class Vec2Text:
    """vec2text's corrector.

    Args:
        corrector: of `vec2text.load_corrector`.
    """

    def __init__(self, corrector: Any):
        self._corrector = corrector

    def decode(self, vectors: Tensor) -> list[str]:
        """Return a text for each of the vectors (N, 768)."""
        from vec2text import invert_embeddings

        device = next(self._corrector.model.parameters()).device
        texts: list[str] = []
        for part in vectors.float().split(ROWS):
            texts += invert_embeddings(embeddings=part.to(device), corrector=self._corrector, num_steps=STEPS)
        return [text.strip() for text in texts]


def load_vec2text(folder: Path | None, space: str) -> Vec2Text:
    """Return vec2text for vectors of a space.

    Args:
        folder: holds `inversion` and `corrector`, copies of the repositories in `HUB`; None: from the hub or its cache.
        space: of the vectors.

    Raises:
        UserError: a space that it cannot decode, or package or weights are not there.
    """
    if space not in SPACES:
        raise UserError(
            f"vec2text cannot decode vectors of {space}",
            f"it was trained on {', '.join(SPACES)}, neither normalized nor through sentence-transformers' Dense "
            f"layer: embed with mean:{GTR}, decode --through vectors of that space, or use an inverter",
        )
    if find_spec("vec2text") is None:
        raise UserError("decoder vec2text is not installed", "pip install .[vec2text], or use --decoder retrieval")
    import vec2text

    hint = "give a folder: --decoder vec2text:DIR"
    folders = {name: hub_folder(HUB[name], hint) if folder is None else folder / name for name in HUB}
    for path in folders.values():
        if not (path / "config.json").is_file():
            raise UserError(
                f"{path} holds no model: it has no config.json",
                f"vec2text:DIR needs {' and '.join(f'DIR/{name} ({hub})' for name, hub in HUB.items())}",
            )
    inversion = _load(vec2text.models.InversionModel, folders["inversion"])
    corrector = _load(vec2text.models.CorrectorEncoderModel, folders["corrector"])
    with _without_metrics():
        return Vec2Text(vec2text.load_corrector(inversion, corrector))


def _load(kind: Any, folder: Path) -> nn.Module:
    """Return a model of vec2text with the weights of a folder."""
    from safetensors.torch import load_file

    model = kind(kind.config_class.from_pretrained(folder))
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    for file in sorted(folder.glob("pytorch_model*.bin")) if not tensors else ():
        tensors |= torch.load(file, map_location="cpu", weights_only=True)
    load_tensors(model, tensors, folder)
    generation = model.encoder_decoder.generation_config
    generation.length_penalty = 1.0 if generation.length_penalty is None else generation.length_penalty
    return model.eval()


@contextmanager
def _without_metrics() -> Iterator[None]:
    """Let vec2text's trainers be made without the metrics that they would load from the hub."""
    import evaluate

    load, evaluate.load = evaluate.load, lambda *args, **kwargs: None
    try:
        yield
    finally:
        evaluate.load = load
