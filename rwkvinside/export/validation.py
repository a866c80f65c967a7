"""Rows of a run's own validation data for the comparison of an export with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.readers import HUB
from ..data.settings import DataConfig, StageData
from ..data.sources import default_cache, missing_sources, mixture_of, read_options
from ..data.tokenize import load_tokens
from ..errors import UserError
from ..runs.trained import TrainedRun
from .probe import run_tokenizer

LONGEST = 1024  # tokens of a document: logits of a large vocabulary are held for all of them
DOCUMENTS, BEGINNING = 4, 256  # of `beginnings`, and their tokens
READ_TOKENS = 2_000_000  # at most, of training data in which validation documents are looked for


def validation_rows(run: TrainedRun, tokenizer: PreTrainedTokenizerBase) -> tuple[Iterator[Tensor], str]:
    """Return the validation documents of a run's last stage, and why there are none, "" if there are.

    Args:
        run: whose data may be gone by now.
        tokenizer: the teacher's.

    Returns:
        Token ids of one document after the other, (T,) int64 with 2 <= T <= `LONGEST`.
    """
    data = DataConfig.model_validate(run.config.get("data") or {})
    stage = StageData.model_validate(run.config["stages"][run.stage]["data"])
    sources = data.val or mixture_of(data, stage)[0]
    missing = missing_sources(
        data.model_copy(update={"train": sources, "val": []}), stage.model_copy(update={"train": None})
    )
    if not sources or missing:
        return iter(()), f"{missing[0]} is not there any more" if missing else "the run names no data"
    if any(source.startswith(HUB) for source in sources):
        return iter(()), "the run's data is on the hub"
    enough = data.val_tokens if data.val else min(READ_TOKENS, int(data.val_tokens / data.val_fraction) + 1)
    options = replace(read_options(data), trust_ids=True, max_tokens=enough)
    cache = Path(data.cache_dir) if data.cache_dir else default_cache()
    try:
        store = load_tokens(sources, tokenizer, options, cache_dir=cache)
    except UserError as error:
        return iter(()), error.cause
    if not data.val:
        store = store.select(np.flatnonzero(store.held_out(data.val_fraction)))
    long_enough = np.flatnonzero(store.lengths >= 2)
    rows = (torch.from_numpy(store.piece(int(i), 0, LONGEST)[0]) for i in long_enough)
    return rows, "" if len(long_enough) else "no validation document is among the first of the run's data"


def beginnings(run: TrainedRun) -> list[Tensor]:
    """Return token ids of the beginnings of some validation documents of a run, [] where it has none."""
    tokenizer = run_tokenizer(run)
    documents, _ = validation_rows(run, tokenizer) if tokenizer else (iter(()), "")
    return [ids[:BEGINNING] for ids in islice(documents, DOCUMENTS)]
