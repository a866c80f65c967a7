"""Rows of a stage, and what a stage reads."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from ..data.batch import Batch
from ..data.mixture import MixedRows
from ..data.rows import PackedRows, PaddedDocuments, document_batches
from ..data.sources import Mixture, Tokens
from ..data.stream import StreamedRows, TokenStream
from ..data.token_store import TokenStore
from .plan import StagePlan

# The order of a stage's rows is drawn from its name. `distill` was spelled with one l when the numbers in
# docs/benchmarks.md were measured: drawn from that spelling, its rows and those numbers stay what they were.
ORDER_NAMES = {"distill": "distil"}

JUDGED_TOKENS = 4096  # of a validation document


JUDGED_BATCH = 8192  # tokens that are judged at a time


Rows = PackedRows | PaddedDocuments | StreamedRows | MixedRows


def rows_of(plan: StagePlan, tokens: Tokens) -> Rows:
    """Return the rows that a stage trains on, in an order of its own."""
    seed = zlib.crc32(f"{plan.run.seed} {ORDER_NAMES.get(plan.name, plan.name)}".encode())

    def of_documents(store: TokenStore, seed: int) -> PackedRows | PaddedDocuments:
        return plan.stage.documents(store, plan.length.seq_len, seed)

    def of_part(part: TokenStore | TokenStream) -> Rows:
        return StreamedRows(part, of_documents, seed) if isinstance(part, TokenStream) else of_documents(part, seed)

    if isinstance(tokens, Mixture):
        return MixedRows([of_part(part) for part in tokens.parts], tokens.weights, seed)
    return of_part(tokens)


def report(plan: StagePlan, tokens: Tokens, rows: Rows, val: TokenStore) -> tuple[list[str], dict]:
    """What a stage will read, for people and as JSON values: tokens, epochs, the realized shares of a mixture."""
    wanted = plan.row_count
    judged = f"{val.num_tokens:,} to validate"
    if isinstance(rows, MixedRows):
        read = rows.tokens_of(wanted)
        lines, facts = [f"{sum(read):,} tokens of {len(read)} sources, {judged}"], []
        width = max(map(len, tokens.sources))
        for source, part, weight, count in zip(tokens.sources, tokens.parts, tokens.weights, read, strict=True):
            share = count / sum(read)
            facts.append({"source": source, "weight": weight, "share": share, "tokens": count, **_epochs(part, count)})
            lines.append(f"  {source:<{width}}  {share:7.2%} (asked for {weight:.2%}), {_amount(part, count)}")
        return lines, {"tokens": sum(read), "sources": facts}
    count = rows.tokens_in(wanted)
    return [f"{_amount(tokens, count)}, {judged}"], {"tokens": count, **_epochs(tokens, count)}


def _epochs(part: TokenStore | TokenStream, read: int) -> dict[str, float]:
    return {} if isinstance(part, TokenStream) else {"epochs": read / part.num_tokens}  # its length is not known yet


def _amount(part: TokenStore | TokenStream, read: int) -> str:
    if isinstance(part, TokenStream):
        return f"{read:,} tokens streamed"
    return f"{read:,} tokens, {read / part.num_tokens:.3g} epochs of {part.num_documents:,} documents"


def sample(rows: Rows, tokens: int, micro_rows: int, device: torch.device) -> list[Batch]:
    """The first rows that hold this many tokens, at most one epoch, as micro-batches on a device."""
    count = min(rows.rows_per_epoch, max(1, tokens // rows.seq_len))
    return [rows.batch(range(i, min(count, i + micro_rows))).to(device) for i in range(0, count, micro_rows)]


def leading_text(rows: Rows, tokens: int) -> Batch:
    """The first tokens of the first rows, at most one epoch, as one row of documents without padding, on the CPU."""
    parts: list[list[Tensor]] = []
    found = documents = row = 0
    while found < tokens and row < rows.rows_per_epoch:
        batch = rows.batch([row])
        segments = batch.segment_ids[batch.mask] + documents
        parts.append([*(t[batch.mask] for t in (batch.input_ids, batch.labels, batch.position_ids)), segments])
        found, documents, row = found + len(segments), int(segments[-1]), row + 1
    return Batch(*(torch.cat(column)[None, :tokens] for column in zip(*parts, strict=True)), rows=(0,))


def validation_batches(val: TokenStore, max_positions: int) -> list[Batch]:
    """The validation documents, each alone in its row."""
    return list(document_batches(PaddedDocuments(val, min(JUDGED_TOKENS, max_positions)), batch_tokens=JUDGED_BATCH))
