"""Compare two models on documents."""

from pathlib import Path

import numpy as np
from rich.console import Console
from transformers import PreTrainedModel

from ..data.rows import PaddedDocuments, document_batches
from ..data.tokenize import load_tokens
from ..support.progress import Progress
from .quality import Evaluation, evaluate_models

LOGITS = 2**28  # elements of a batch's logits (1 GiB in fp32), for each of the two models


def read_documents(
    sources: list[str], tokenizer, cache_dir: Path, max_length: int, max_documents: int | None = None
) -> PaddedDocuments:
    """Documents to evaluate, one per row; the token ids stand in `cache_dir` as long as they are used."""
    store = load_tokens(sources, tokenizer, cache_dir=cache_dir)
    if max_documents is not None:
        store = store.select(np.arange(min(max_documents, store.num_documents)))
    return PaddedDocuments(store, max_length)


def evaluate(
    student: PreTrainedModel, teacher: PreTrainedModel, documents: PaddedDocuments, notes: Console
) -> Evaluation:
    """`evaluate_models`, showing on `notes` how far it is."""
    batch_tokens = min(8192, max(1, LOGITS // teacher.config.vocab_size))
    with Progress("evaluating", len(documents), unit="documents", stream=notes.file) as progress:
        batches = document_batches(documents, batch_tokens=batch_tokens)
        return evaluate_models(student, teacher, batches, progress=progress.advance)
