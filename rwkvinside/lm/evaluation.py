"""How well and at what cost a model reads long sequences: whole, in chunks with its state, in chunks without it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError
from ..support.progress import Progress
from .cost import Cost, measured
from .session import CHUNK_SIZE, StatefulModel, logits_of

DOCUMENTS = 4  # that are read unless others are given
CHUNKS = 4  # of each, at most
SMALLEST_CHUNK = 16  # that is compared with the chunk size that was asked for


def evaluate_sequence_modeling(
    model: StatefulModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chunk_size: int = CHUNK_SIZE,
    *,
    texts: Sequence[str] | None = None,
    max_length: int | None = None,
) -> dict:
    """Measure a model on texts; nothing in the result comes from settings but the chunk sizes.

    Args:
        model: any causal language model.
        tokenizer: of the model.
        chunk_size: tokens of a chunk; other sizes are measured for comparison.
        texts: what to read; None: the longest help texts of this machine's Python, prose that is everywhere.
        max_length: tokens of a text that are read; None: `CHUNKS` chunks.

    Returns:
        See `evaluate_documents`.

    Raises:
        UserError: see `evaluate_documents`.
    """
    texts = help_texts(DOCUMENTS) if texts is None else texts
    max_length = max_length or CHUNKS * chunk_size
    encoded = (tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0] for text in texts)
    return evaluate_documents(model, [ids[:max_length] for ids in encoded], chunk_size)


def help_texts(count: int) -> list[str]:
    """Return the longest texts of Python's own `help()`, tens of thousands of characters each."""
    from pydoc_data.topics import topics

    return sorted(topics.values(), key=len, reverse=True)[:count]


@torch.no_grad()
def evaluate_documents(
    model: StatefulModel | PreTrainedModel,
    documents: Sequence[Tensor],
    chunk_size: int,
    progress: Progress | None = None,
) -> dict:
    """Measure a model on documents, each alone.

    Args:
        model: any causal language model; in eval mode during the call.
        documents: (T,) token ids each.
        chunk_size: tokens of a chunk.
        progress: counts the tokens of all passes; gets its total here.

    Returns:
        Plain JSON. Latencies are milliseconds of one document from its first to its last token, means over documents:

        perplexity, latency_ms: of chunks of `chunk_size` with the state.
        sequence_results: the same of every document, with "tokens".
        with_state_perplexity, without_state_perplexity: of the tokens after the first chunk of each document, with the
            state and with an empty one at every border; state_benefit_ratio: the second by the first.
        full_processing_perplexity, full_processing_latency_ms, full_processing_peak_bytes: of whole documents.
        chunked_processing_results: for several sizes chunk_size, perplexity, latency_ms, peak_bytes; speed_ratio, the
            latency of whole documents by this one, and memory_ratio, this peak by that of whole documents (None where
            the system cannot measure it, see `Cost`).
        by_position: first, last, tokens, ce and perplexity of the predictions after so many tokens.
        chunk_size, documents, tokens: what was read.

    Raises:
        UserError: no document is longer than a chunk.
    """
    if not any(len(ids) > chunk_size + 1 for ids in documents):
        longest = max(map(len, documents), default=0)
        raise UserError(
            f"no document is longer than a chunk of {chunk_size} tokens, the longest has {longest}",
            "give a smaller chunk size, longer documents, or a larger limit of their tokens",
        )
    stateful = model if isinstance(model, StatefulModel) else StatefulModel(model)
    documents = sorted((ids for ids in documents if len(ids) > 1), key=len, reverse=True)
    longest = len(documents[0])
    sizes = _sizes(chunk_size, longest)
    if progress is not None:
        progress.total = (2 + len(sizes)) * sum(map(len, documents))
    passes = _Passes(stateful, documents, progress)
    training = stateful.training
    stateful.eval()
    try:
        passes.warm_up()
        full = passes.run(longest)
        chunked = {size: passes.run(size) for size in sizes}
        alone = passes.run(chunk_size, with_state=False)
    finally:
        stateful.train(training)
    return _report(documents, chunk_size, full, chunked, alone)


def _sizes(chunk_size: int, longest: int) -> list[int]:
    """Return the sizes of chunks that are compared, the one that was asked for among them."""
    around = (chunk_size // 16, chunk_size // 4, chunk_size, 2 * chunk_size)
    return [size for size in around if size == chunk_size or SMALLEST_CHUNK <= size < longest]


@dataclass(frozen=True)
class _Pass:
    """All documents read in one way: the cross-entropy of each one's tokens (T - 1,), and what each cost."""

    losses: list[Tensor]
    costs: list[Cost]

    @property
    def perplexity(self) -> float:
        return perplexity(torch.cat(self.losses))

    @property
    def latency_ms(self) -> float:
        return 1000 * sum(cost.seconds for cost in self.costs) / len(self.costs)

    @property
    def peak_bytes(self) -> int | None:
        """Of the longest document, which comes first."""
        return self.costs[0].peak_bytes


class _Passes:
    def __init__(self, model: StatefulModel, documents: list[Tensor], progress: Progress | None):
        self._model, self._documents, self._progress = model, documents, progress

    def warm_up(self) -> None:
        """Load and compile what is used, at the largest size."""
        _losses(self._model, self._documents[0], len(self._documents[0]))

    def run(self, chunk_size: int, with_state: bool = True) -> _Pass:
        """Read all documents in chunks."""
        result = _Pass([], [])
        for ids in self._documents:
            read = partial(_losses, self._model, ids, chunk_size, with_state)
            losses, cost = measured(read, self._model.device)
            result.losses.append(losses)
            result.costs.append(cost)
            if self._progress is not None:
                self._progress.advance(len(ids))
        return result


def _losses(model: StatefulModel, ids: Tensor, chunk_size: int, with_state: bool = True) -> Tensor:
    """Return the cross-entropy of each token but the first, (T - 1,) fp32 on the CPU."""
    found = []
    for chunk, logits in chunk_logits(model, ids[None, :-1], chunk_size, with_state):
        targets = ids[1:][chunk].to(logits.device)
        found.append(F.cross_entropy(logits[0].float(), targets, reduction="none").cpu())
    return torch.cat(found)


def chunk_logits(
    model: StatefulModel, ids: Tensor, chunk_size: int, with_state: bool = True
) -> Iterator[tuple[slice, Tensor]]:
    """Yield each chunk's place in the sequence and its logits (B, c, V).

    Args:
        model: reads.
        ids: (B, T).
        chunk_size: c, of all chunks but the last.
        with_state: False: each chunk begins anew.
    """
    state = None
    for start in range(0, ids.shape[1], chunk_size):
        chunk = slice(start, min(start + chunk_size, ids.shape[1]))
        outputs, state = model.process_with_state(ids[:, chunk].to(model.device), state if with_state else None)
        yield chunk, logits_of(outputs)


def perplexity(losses: Tensor) -> float:
    """Return exp of the mean of cross-entropies in nats."""
    return math.exp(losses.double().mean())


def _report(documents: list[Tensor], chunk_size: int, full: _Pass, chunked: dict[int, _Pass], alone: _Pass) -> dict:
    asked = chunked[chunk_size]
    later = [torch.cat([losses[chunk_size:] for losses in way.losses]) for way in (asked, alone)]
    with_state, without_state = map(perplexity, later)
    return {
        "chunk_size": chunk_size,
        "documents": len(documents),
        "tokens": sum(map(len, documents)),
        "perplexity": asked.perplexity,
        "latency_ms": asked.latency_ms,
        "sequence_results": [
            {"tokens": len(ids), "perplexity": perplexity(losses), "latency_ms": 1000 * cost.seconds}
            for ids, losses, cost in zip(documents, asked.losses, asked.costs, strict=True)
        ],
        "with_state_perplexity": with_state,
        "without_state_perplexity": without_state,
        "state_benefit_ratio": without_state / with_state,
        "full_processing_perplexity": full.perplexity,
        "full_processing_latency_ms": full.latency_ms,
        "full_processing_peak_bytes": full.peak_bytes,
        "chunked_processing_results": [
            {
                "chunk_size": size,
                "perplexity": way.perplexity,
                "latency_ms": way.latency_ms,
                "peak_bytes": way.peak_bytes,
                "speed_ratio": full.latency_ms / way.latency_ms,
                "memory_ratio": way.peak_bytes / full.peak_bytes if way.peak_bytes and full.peak_bytes else None,
            }
            for size, way in chunked.items()
        ],
        "by_position": by_position(asked.losses),
    }


def by_position(losses: Sequence[Tensor]) -> list[dict]:
    """Return the mean cross-entropy of the predictions after 1, 2-3, 4-7, ... tokens.

    Args:
        losses: of each document, (T - 1,): element i is that of the prediction after i + 1 tokens.
    """
    buckets, first = [], 1
    while rest := [part for part in (x[first - 1 : 2 * first - 1] for x in losses) if len(part)]:
        values = torch.cat(rest).double()
        buckets.append(
            {
                "first": first,
                "last": first + max(map(len, rest)) - 1,
                "tokens": len(values),
                "ce": values.mean().item(),
                "perplexity": perplexity(values),
            }
        )
        first *= 2
    return buckets
