"""The data of a run: tokens of each stage, the validation documents, and rows for training and judging."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .config import Config, StageConfig
from .data import Batch, PackedRows, PaddedDocuments, TokenStore, load_tokens
from .data.readers import HUB
from .errors import UserError
from .evaluate.quality import document_batches
from .training.world import World

JUDGED_TOKENS = 4096  # of a validation document
JUDGED_LOGITS = 2**28  # elements of a batch's logits (1 GiB in fp32), for student and teacher each


def tokens_of(
    config: Config, stage: StageConfig, tokenizer: PreTrainedTokenizerBase, vocab: int, world: World
) -> tuple[TokenStore, TokenStore]:
    """Training and validation tokens of a stage. The first process reads and tokenises, the others find its result.

    Raises:
        UserError: no data is named, or it cannot be used.
    """
    train = stage.data.train or config.data.train
    if not train:
        raise UserError("no training data is given", "name files or directories with --data, or set data.train")
    if not world.is_main:
        world.barrier()
    cache = Path(config.data.cache_dir) if config.data.cache_dir else Path.home() / ".cache" / "rwkvinside" / "tokens"

    def load(sources: list[str], most: int | None) -> TokenStore:
        return load_tokens(
            sources,
            tokenizer,
            cache_dir=cache,
            vocab_size=vocab,
            text_column=config.data.text_column,
            max_tokens=most,
        )

    endless = any(source.startswith(HUB) for source in train)
    store = load(train, _needed(config) if endless else None)
    if config.data.val:
        val = load(config.data.val, config.data.val_tokens)
    else:
        store, val = store.split(config.data.val_fraction)
    if world.is_main:
        world.barrier()
    return store, _at_most(val, config.data.val_tokens)


def _needed(config: Config) -> int:
    """Tokens of an endless source that the longest stage reads, and those it gives away for validation."""
    longest = max(stage.steps * stage.rows * stage.data.seq_len for stage in config.stages.values())
    return int(longest / (1 - config.data.val_fraction)) + config.data.val_tokens


def _at_most(store: TokenStore, tokens: int) -> TokenStore:
    """The first documents that hold this many tokens together, at least one."""
    count = int(np.searchsorted(np.cumsum(store.lengths), tokens, side="right"))
    return store if count >= store.num_documents else store.select(np.arange(max(1, count)))


def rows_of(config: Config, name: str, tokens: TokenStore) -> PackedRows | PaddedDocuments:
    """The rows a stage trains on, in an order of its own: packed, for sft one document a row."""
    stage = config.stages[name]
    seed = zlib.crc32(f"{config.seed} {name}".encode())
    if stage.objective == "sft":
        return PaddedDocuments(tokens, stage.data.seq_len, seed=seed)
    return PackedRows(tokens, stage.data.seq_len, seed)


def sample(rows: PackedRows, tokens: int, micro_rows: int, device: torch.device) -> list[Batch]:
    """The first rows that hold this many tokens, at most one epoch, as micro-batches on a device."""
    count = min(rows.rows_per_epoch, max(1, tokens // rows.seq_len))
    return [rows.batch(range(i, min(count, i + micro_rows))).to(device) for i in range(0, count, micro_rows)]


def judged_batches(val: TokenStore, max_positions: int, vocab: int) -> list[Batch]:
    """The validation documents, each alone in its row."""
    documents = PaddedDocuments(val, min(JUDGED_TOKENS, max_positions))
    return list(document_batches(documents, batch_tokens=max(1, JUDGED_LOGITS // vocab)))
