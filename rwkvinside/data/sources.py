"""The data of a run: the tokens and the validation documents of each stage."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from .tokenize import ReadOptions, load_tokens


class Processes(Protocol):
    """Processes of a run, as far as loading data needs them."""

    is_main: bool

    def barrier(self) -> None:
        """Wait until all processes have reached this point."""


@dataclass(frozen=True)
class Mixture:
    """Several sources, each with its share of the tokens.

    Attributes:
        sources: as the user named them.
        parts: their tokens.
        weights: their shares, together 1.
    """

    sources: tuple[str, ...]
    parts: tuple[TokenStore | TokenStream, ...]
    weights: tuple[float, ...]

    @property
    def fingerprint(self) -> str:
        """Hash that changes with any token or share."""
        shares = [[part.fingerprint, f"{weight:.9f}"] for part, weight in zip(self.parts, self.weights, strict=True)]
        return hashlib.sha256(str(shares).encode()).hexdigest()[:32]


Tokens = TokenStore | TokenStream | Mixture


def default_cache() -> Path:
    """Return the directory of cached tokens when the configuration names none."""
    return Path.home() / ".cache" / "rwkvinside" / "tokens"


@contextmanager
def tokenizing_progress() -> Iterator[Callable[[int, int], None]]:
    """Show tokenizing progress on stderr; yields a `progress` for `load_tokens`."""
    with Progress("tokenizing", unit="documents") as progress:
        yield lambda documents, tokens: progress.update(documents, f"{tokens:,} tokens")


def tokens_of(
    data: DataConfig,
    stage: StageData,
    endless_tokens: int,
    tokenizer: PreTrainedTokenizerBase,
    vocab: int,
    world: Processes,
) -> tuple[Tokens, TokenStore]:
    """Return training and validation tokens of a stage.

    Rank 0 reads and tokenizes; the others load its result.

    Args:
        data: settings of the run.
        stage: settings of the stage, which may name its own sources.
        endless_tokens: how much to read of an endless source, see `endless_tokens`.
        tokenizer: the teacher's.
        vocab: rows of the teacher's embedding; larger ids are refused.
        world: the processes that share the data.

    Raises:
        UserError: no data is named, or it cannot be used.
    """
    sources, weights = named_mixture(data, stage)
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
            f"a validation split of {fraction:g} takes none of the documents at the beginning of the data",
            "give a validation source (--val), or raise data.val_fraction",
        )
    if world.is_main:
        world.barrier()
    return tokens, val.first(data.val_tokens)


def read_options(data: DataConfig) -> ReadOptions:
    """Return how a run reads its sources."""
    return ReadOptions(
        text_column=data.text_column,
        rotate=data.rotate_options,
        today=data.today,
        end=data.end_of_text,
        max_line_bytes=data.max_line_bytes,
    )


def close(tokens: Tokens) -> None:
    """Stop reading ahead what is streamed."""
    for part in tokens.parts if isinstance(tokens, Mixture) else [tokens]:
        if isinstance(part, TokenStream):
            part.close()


def mixture_of(data: DataConfig, stage: StageData) -> tuple[list[str], list[float] | None]:
    """Return the sources of a stage and their shares of its tokens.

    Returns:
        (sources, shares); shares sum to 1, or are None where every document counts once an epoch.

    Raises:
        UserError: several sources are streamed without shares.
    """
    settings = stage if stage.train else data
    if settings.weights is None:
        if data.stream and len(settings.train) > 1:
            raise UserError(
                f"data.stream reads one source after the other, and a stage names {len(settings.train)}",
                "give weights to mix them",
            )
        return settings.train, None
    return settings.train, [weight / sum(settings.weights) for weight in settings.weights]


def named_mixture(data: DataConfig, stage: StageData) -> tuple[list[str], list[float] | None]:
    """Return `mixture_of` a stage that names data; raises what that does, and where there is none."""
    sources, weights = mixture_of(data, stage)
    if not sources:
        raise UserError(
            "no training data is given",
            "name files or directories with --data (train_rwkv.py: --train_file), or set data.train",
        )
    return sources, weights


def endless_tokens(data: DataConfig, longest: int) -> int:
    """Return how many tokens to read of an endless source, for all stages of a run.

    Args:
        data: settings of the run.
        longest: tokens that the longest stage trains on; those held out for validation are added.
    """
    return int(longest / (1 - data.val_fraction)) + data.val_tokens


class _Loader:
    """Loads the sources of one stage."""

    def __init__(self, data: DataConfig, stage: StageData, needed: int, tokenizer: PreTrainedTokenizerBase, vocab: int):
        self.data, self.needed, self.tokenizer, self.vocab = data, needed, tokenizer, vocab
        self.cache = Path(data.cache_dir) if data.cache_dir else default_cache()
        self.masks = stage.loss_on == "completions"

    def load(self, sources: Sequence[str], max_tokens: int | None) -> TokenStore:
        trusted = not self.data.check_ids
        options = replace(read_options(self.data), vocab_size=self.vocab, trust_ids=trusted, max_tokens=max_tokens)
        with tokenizing_progress() as progress:
            store = load_tokens(sources, self.tokenizer, options, cache_dir=self.cache, progress=progress)
        return store if self.masks else store.without_masks()

    def can_stream(self, source: str) -> bool:
        """Return whether a source has to be tokenized; ids on disk need no stream."""
        return not is_pack(source) and not is_binidx(source)

    def stream(self, source: str, fraction: float) -> TokenStream:
        def check(first: TokenStore) -> None:
            first.check_vocab(self.vocab)
            if self.data.check_ids and first.facts.get("kind tokens"):
                check_ids(first, self.tokenizer, source)

        return TokenStream(
            source,
            Encoder(
                self.tokenizer,
                rotate=self.data.rotate_options,
                today=self.data.today,
                end=self.data.end_of_text,
            ),
            cache_dir=self.cache,
            block_tokens=self.data.block_tokens,
            text_column=self.data.text_column,
            max_line_bytes=self.data.max_line_bytes,
            val_fraction=fraction,
            masks=self.masks,
            check=check,
        )

    def mixture(self, sources: list[str], weights: list[float], fraction: float) -> tuple[Mixture, TokenStore | None]:
        """Return the sources with their shares, and validation documents in proportion."""
        parts, validation = [], []
        for source, weight in zip(sources, weights, strict=True):
            if self.data.stream and self.can_stream(source):
                part = self.stream(source, fraction)
                val = part.validation() if fraction else None
            else:
                store = self.load([source], int(self.needed * weight) + 1 if source.startswith(HUB) else None)
                held_out = store.held_out(fraction)
                if held_out.all():
                    raise UserError(
                        f"a validation split of {fraction:g} takes all of {source}", "give a validation source (--val)"
                    )
                part, val = store.select(np.flatnonzero(~held_out)), store.select(np.flatnonzero(held_out))
            parts.append(part)
            if val is not None and val.num_documents:
                validation.append(val.first(int(weight * self.data.val_tokens)))
        return Mixture(tuple(sources), tuple(parts), tuple(weights)), join(validation) if validation else None


def describe(data: DataConfig, stage: StageData) -> str:
    """Return in words what a stage trains on; opens nothing, but names missing files.

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
    """Return the local training and validation sources of a stage that do not exist."""
    sources, _ = mixture_of(data, stage)
    return [source for source in dict.fromkeys((*sources, *data.val)) if not _exists(source)]


def _exists(source: str) -> bool:
    """Return whether a source is on this machine, or is not meant to be."""
    return source.startswith(HUB) or Path(source).exists() or all(file.is_file() for file in pair(source))


def check_sources(sources: Sequence[str]) -> None:
    """Refuse local sources that do not exist; of a link to nowhere the reader says more.

    Raises:
        UserError: names the first of them.
    """
    for source in sources:
        if not _exists(source) and not Path(source).is_symlink():
            raise UserError(f"data {source!r} does not exist", "give a file, a directory or hub:NAME")
