"""The data of a run: tokens of each stage, the validation documents, and rows for training and evaluation_teacher."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..support.progress import Progress
from .binidx import is_binidx, pair
from .encode import Encoder, check_ids
from .readers import HUB
from .settings import DataConfig, StageData
from .stream import TokenStream
from .token_pack import is_pack
from .token_store import TokenStore, join
from .tokenize import load_tokens


class Processes(Protocol):
    """The processes of a run, as far as loading data needs them."""

    is_main: bool

    def barrier(self) -> None:
        """Wait until all processes are here."""


@dataclass(frozen=True)
class Mixture:
    """Several sources of which each has its share of the tokens.

    Args:
        sources: as the user named them.
        parts: their tokens.
        weights: their shares, together 1.
    """

    sources: tuple[str, ...]
    parts: tuple[TokenStore | TokenStream, ...]
    weights: tuple[float, ...]

    @property
    def fingerprint(self) -> str:
        """Changes when any token or share changes."""
        whole = [[part.fingerprint, f"{weight:.9f}"] for part, weight in zip(self.parts, self.weights, strict=True)]
        return hashlib.sha256(str(whole).encode()).hexdigest()[:32]


Tokens = TokenStore | TokenStream | Mixture


def default_cache() -> Path:
    """Where tokens are kept unless the configuration says otherwise."""
    return Path.home() / ".cache" / "rwkvinside" / "tokens"


@contextmanager
def tokenizing_progress() -> Iterator[Callable[[int, int], None]]:
    """Show on stderr how far tokenizing is; yields a `progress` for `load_tokens`."""
    with Progress("tokenizing", unit="documents") as shown:
        yield lambda documents, tokens: shown.update(documents, f"{tokens:,} tokens")


def tokens_of(
    data: DataConfig,
    stage: StageData,
    endless_tokens: int,
    tokenizer: PreTrainedTokenizerBase,
    vocab: int,
    world: Processes,
) -> tuple[Tokens, TokenStore]:
    """Return training and validation tokens of a stage.

    Rank 0 reads and tokenizes, the others find its result.

    Args:
        data: of the run; stage: of the stage, which may name sources of its own.
        endless_tokens: how much is read of a source without an end, see `endless_tokens`.
        vocab: ids from here on are refused.

    Raises:
        UserError: no data is named, or it cannot be used.
    """
    sources, weights = mixture_of(data, stage)
    if not sources:
        raise UserError("no training data is given", "name files or directories with --data, or set data.train")
    if not world.is_main:
        world.barrier()
    loader = _Loader(data, stage, endless_tokens, tokenizer, vocab)
    fraction = 0.0 if data.val else data.val_fraction
    if weights is not None:
        tokens, val = loader.mixture(sources, weights, fraction)
    elif data.stream and loader.can_stream(sources[0]):
        tokens = loader.stream(sources[0], fraction)
        val = tokens.validation() if fraction else None
    else:
        endless = any(source.startswith(HUB) for source in sources)
        tokens, val = loader.load(sources, loader.needed if endless else None).split(fraction)
    if data.val:
        val = loader.load(data.val, data.val_tokens)
    elif val is None or not val.num_documents:
        raise UserError(
            f"a validation split of {fraction:g} takes nothing of the data that is there at the beginning",
            "give a validation source (--val), or raise data.val_fraction",
        )
    if world.is_main:
        world.barrier()
    return tokens, val.first(data.val_tokens)


def mixture_of(data: DataConfig, stage: StageData) -> tuple[list[str], list[float] | None]:
    """(sources, shares) that a stage trains on; shares are None where every document counts once an epoch.

    Raises:
        UserError: several sources are streamed without shares.
    """
    given = stage if stage.train else data
    if given.weights is None:
        if data.stream and len(given.train) > 1:
            raise UserError(
                f"data.stream reads one source after the other, and a stage names {len(given.train)}",
                "mix them: give weights beside train",
            )
        return given.train, None
    return given.train, [weight / sum(given.weights) for weight in given.weights]


def endless_tokens(data: DataConfig, longest: int) -> int:
    """Return how many tokens are read of a source without an end.

    All stages of a run share them, alone or one after the other.

    Args:
        longest: tokens that the longest stage reads; what it gives away for validation comes on top.
    """
    return int(longest / (1 - data.val_fraction)) + data.val_tokens


class _Loader:
    """How this stage loads a source."""

    def __init__(self, data: DataConfig, stage: StageData, needed: int, tokenizer: PreTrainedTokenizerBase, vocab: int):
        self.data, self.needed, self.tokenizer, self.vocab = data, needed, tokenizer, vocab
        self.cache = Path(data.cache_dir) if data.cache_dir else default_cache()
        self.masks = stage.loss_on == "completions"

    def load(self, sources: Sequence[str], most: int | None) -> TokenStore:
        with tokenizing_progress() as progress:
            store = load_tokens(
                sources,
                self.tokenizer,
                cache_dir=self.cache,
                vocab_size=self.vocab,
                text_column=self.data.text_column,
                rotate=self.data.rotate_options,
                trust_ids=not self.data.check_ids,
                max_tokens=most,
                progress=progress,
            )
        return store if self.masks else store.without_masks()

    def can_stream(self, source: str) -> bool:
        """Ids that lie on disk already need no stream."""
        return not is_pack(source) and not is_binidx(source)

    def stream(self, source: str, fraction: float) -> TokenStream:
        def check(first: TokenStore) -> None:
            first.check_vocab(self.vocab)
            if self.data.check_ids and first.facts.get("kind tokens"):
                check_ids(first, self.tokenizer, source)

        return TokenStream(
            source,
            Encoder(self.tokenizer, rotate=self.data.rotate_options),
            cache_dir=self.cache,
            block_tokens=self.data.block_tokens,
            text_column=self.data.text_column,
            val_fraction=fraction,
            masks=self.masks,
            check=check,
        )

    def mixture(self, sources: list[str], weights: list[float], fraction: float) -> tuple[Mixture, TokenStore | None]:
        """The sources with their shares, and validation documents of each in proportion."""
        parts, judged = [], []
        for source, weight in zip(sources, weights, strict=True):
            if self.data.stream and self.can_stream(source):
                part = self.stream(source, fraction)
                val = part.validation() if fraction else None
            else:
                store = self.load([source], int(self.needed * weight) + 1 if source.startswith(HUB) else None)
                held = store.held_out(fraction)
                if held.all():
                    raise UserError(
                        f"a validation split of {fraction:g} takes all of {source}", "give a validation source (--val)"
                    )
                part, val = store.select(np.flatnonzero(~held)), store.select(np.flatnonzero(held))
            parts.append(part)
            if val is not None and val.num_documents:
                judged.append(val.first(int(weight * self.data.val_tokens)))
        return Mixture(tuple(sources), tuple(parts), tuple(weights)), join(judged) if judged else None


def describe(data: DataConfig, stage: StageData) -> str:
    """What a stage trains on, in words, without a look at it; but missing files are named.

    Raises:
        UserError: see `mixture_of`.
    """
    sources, weights = mixture_of(data, stage)
    if not sources:
        return "none given yet (--data)"
    text = ", ".join(sources)
    if weights is not None:
        shares = [f"{source} {100 * weight:.3g} %" for source, weight in zip(sources, weights, strict=True)]
        text = f"{', '.join(shares)} of the tokens"
    if data.stream:
        text += f"; streamed in blocks of {data.block_tokens:,} tokens"
    if stage.loss_on == "all":
        text += "; every token of conversations is a target"
    if missing := missing_sources(data, stage):
        text += f"; NOT FOUND: {', '.join(missing)}"
    return text


def missing_sources(data: DataConfig, stage: StageData) -> list[str]:
    """Sources of a stage, for training and validation, that should be on this machine and are not."""
    sources, _ = mixture_of(data, stage)
    return [source for source in dict.fromkeys((*sources, *data.val)) if not _is_there(source)]


def _is_there(source: str) -> bool:
    """Whether a source is on this machine, or is not meant to be."""
    return source.startswith(HUB) or Path(source).exists() or all(file.is_file() for file in pair(source))
