"""The rows of a stage, and what it reads in all."""

from __future__ import annotations

import math
import zlib
from dataclasses import replace

import torch
from torch import Tensor

from ..data.batch import IGNORE, Batch
from ..data.mixture import MixedRows
from ..data.rows import ContinuedRows, DocumentRows, PackedRows, PaddedDocuments, ShuffledRows, document_batches
from ..data.sources import Mixture, Tokens
from ..data.stream import StreamedRows, TokenStream
from ..data.token_store import TokenStore
from ..errors import UserError
from .plan import StagePlan

# The order of a stage's rows is drawn from its name. `distill` was spelled with one l when the numbers in
# docs/benchmarks.md were measured: drawn from that spelling, its rows and those numbers stay what they were.
ORDER_NAMES = {"distill": "distil"}

JUDGED_TOKENS = 4096  # of a validation document
JUDGED_BATCH = 8192  # tokens that are evaluated at a time

Rows = DocumentRows | StreamedRows | MixedRows


def rows_of(plan: StagePlan, tokens: Tokens) -> Rows:
    """Return the rows that a stage reads, in a random order of documents; what trains gets them in a random order, too.

    Raises:
        UserError: rows of a mixture that are to go on from step to step.
    """
    seed = zlib.crc32(f"{plan.run.seed} {ORDER_NAMES.get(plan.name, plan.name)}".encode())

    def of_documents(store: TokenStore, seed: int) -> DocumentRows:
        rows = plan.stage.documents(store, plan.length.seq_len, seed)
        if not isinstance(rows, PackedRows) or not plan.stage.trains:
            return rows
        if not plan.stage.in_streams:
            return ShuffledRows(rows)
        return ContinuedRows(rows, plan.length.rows_per_step, run_on=plan.settings.stateful)

    def of_source(source: TokenStore | TokenStream) -> DocumentRows | StreamedRows:
        if isinstance(source, TokenStream):
            return StreamedRows(source, of_documents, seed)
        return of_documents(source, seed)

    if isinstance(tokens, Mixture):
        if plan.settings.stateful:
            raise UserError(
                f"stages.{plan.name}.stateful: rows of a mixture do not go on from step to step",
                "leave out weights, so that all sources are read as one",
            )
        return MixedRows([of_source(source) for source in tokens.parts], tokens.weights, seed)
    return of_source(tokens)


def report(plan: StagePlan, tokens: Tokens, rows: Rows, val: TokenStore) -> tuple[list[str], dict]:
    """Return what a stage will read, for people and as JSON values.

    It tells tokens, epochs, and the realized shares of a mixture.
    """
    validation = f"{val.num_tokens:,} tokens to validate"
    if plan.stage.chooses_layers:
        return [f"{validation}, on which layers are measured"], {"tokens": 0}
    if isinstance(tokens, Mixture) and isinstance(rows, MixedRows):
        read = rows.tokens_of(plan.row_count)
        lines, facts = [f"{sum(read):,} tokens of {len(read)} sources, {validation}"], []
        width = max(map(len, tokens.sources))
        for name, source, weight, count in zip(tokens.sources, tokens.parts, tokens.weights, read, strict=True):
            share = count / sum(read)
            facts.append({"source": name, "weight": weight, "share": share, "tokens": count, **_epochs(source, count)})
            lines.append(f"  {name:<{width}}  {share:7.2%} (asked for {weight:.2%}), {_amount(source, count)}")
        return lines, {"tokens": sum(read), "sources": facts}
    if isinstance(tokens, Mixture) or isinstance(rows, MixedRows):
        raise TypeError("rows of a mixture come from a mixture")
    count = rows.tokens_in(plan.row_count)
    positions = plan.row_count * plan.length.seq_len
    padding = f", {1 - count / positions:.1%} of the rows is padding" if count < 0.99 * positions else ""
    return [f"{_amount(tokens, count)}{padding}, {validation}"], {"tokens": count, **_epochs(tokens, count)}


def _epochs(source: TokenStore | TokenStream, read: int) -> dict[str, float]:
    # the length of a stream is not known yet
    return {} if isinstance(source, TokenStream) else {"epochs": read / source.num_tokens}


def _amount(source: TokenStore | TokenStream, read: int) -> str:
    if isinstance(source, TokenStream):
        return f"{read:,} tokens streamed"
    return f"{read:,} tokens, {read / source.num_tokens:.3g} epochs of {source.num_documents:,} documents"


def check_targets(plan: StagePlan, tokens: Tokens, val: TokenStore) -> None:
    """Refuse data without a token to predict, on which a stage would train without a gradient or judge nothing.

    Of a stream its first block counts.

    Raises:
        UserError: names the stage and its data.
    """
    hint = (
        "a document needs two tokens or more, of which labels, masks and loss flags leave one as a target within "
        f"stages.{plan.name}.data.seq_len; stages.{plan.name}.data.loss_on=all ignores them"
    )
    if plan.stage.reads_targets:
        length = plan.length.seq_len if plan.stage.cuts_documents else None
        parts = tokens.parts if isinstance(tokens, Mixture) else (tokens,)
        stores = [part.training(0) if isinstance(part, TokenStream) else part for part in parts]
        if not any(store is not None and store.has_targets(length) for store in stores):
            raise UserError(f"stage {plan.name}: its training data has no token to predict", hint)
    if not val.has_targets(JUDGED_TOKENS):
        raise UserError(f"stage {plan.name}: the validation data has no token to predict", hint)


def sample(rows: Rows, tokens: int, micro_rows: int, device: torch.device) -> list[Batch]:
    """Return the first rows that hold this many tokens or more, as micro-batches.

    They are on `device`, and at most one epoch.
    """
    count = int(min(rows.rows_per_epoch, math.ceil(tokens / rows.seq_len)))  # a stream's epoch is infinite
    return [rows.batch(range(i, min(count, i + micro_rows))).to(device) for i in range(0, count, micro_rows)]


def leading_text(rows: Rows, tokens: int) -> Batch:
    """Return the first tokens of the first rows as one row of documents.

    Without padding, on the CPU, at most one epoch.
    """
    texts: list[list[Tensor]] = []
    count = documents = row = 0
    while count < tokens and row < rows.rows_per_epoch:
        batch = rows.batch([row])
        segments = batch.segment_ids[batch.mask] + documents
        texts.append([*(t[batch.mask] for t in (batch.input_ids, batch.labels, batch.position_ids)), segments])
        count, documents, row = count + len(segments), int(segments[-1]), row + 1
    ids, labels, positions, segments = (torch.cat(column)[None, :tokens] for column in zip(*texts, strict=True))
    return Batch(ids, labels, positions, segments, rows=(0,))


def validation_batches(plan: StagePlan, val: TokenStore, max_positions: int) -> list[Batch]:
    """Return batches of the validation documents.

    Each is alone in its row and cut to the model's context, or all are in packed rows as the stage trains on. Of a
    stateful stage these go on from batch to batch of the same rank: every `plan.run.ranks`-th is one rank's.
    """
    if plan.settings.stateful:
        streams = judged_streams(plan)
        rows = ContinuedRows(PackedRows(val, plan.length.seq_len, seed=0), streams, run_on=True)
        steps = (range(first, first + streams) for first in range(0, rows.rows_per_epoch, streams))
        return [_once(rows, step, rank, plan.run.ranks) for step in steps for rank in range(plan.run.ranks)]
    if plan.stage.packs_validation:
        packed = PackedRows(val, plan.length.seq_len, seed=0)
        size = max(1, JUDGED_BATCH // packed.seq_len)
        numbers = range(packed.rows_per_epoch)
        return [packed.batch(numbers[i : i + size]) for i in range(0, len(numbers), size)]
    return list(document_batches(PaddedDocuments(val, min(JUDGED_TOKENS, max_positions)), batch_tokens=JUDGED_BATCH))


def judged_streams(plan: StagePlan) -> int:
    """Return in how many streams all ranks read the validation text of a stateful stage: few, so that they are long."""
    return min(plan.length.rows_per_step, max(1, JUDGED_BATCH // plan.length.seq_len))


def _once(rows: ContinuedRows, step: range, rank: int, ranks: int) -> Batch:
    """Return a rank's share of a step's rows, or one that fills up; that and what has come before have no targets."""
    own = step[rank::ranks]
    batch = rows.batch(own or step[:1])
    counts = torch.tensor([bool(own) and rows.is_first(i) for i in batch.rows])
    return batch if counts.all() else replace(batch, labels=batch.labels.where(counts[:, None], IGNORE))
