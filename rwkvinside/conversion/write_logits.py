"""A teacher's likeliest tokens for the rows of a stage, written to disk.

This is `rwkvinside data logits`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..config.resolve import resolve, with_steps
from ..config.schema import Config
from ..data.batch import IGNORE, Batch
from ..data.sources import tokens_of
from ..errors import Interrupted, UserError
from ..losses.chunked import chunk_tokens
from ..runs.directory import DIGESTS
from ..stages.plan import StagePlan
from ..stages.registry import objective_class
from ..stages.rows import Rows, rows_of
from ..stages.teacher import cache_identity, check_model, data_hash, online_teacher, shared_vocab
from ..support.digests import FileDigests
from ..support.files import free_bytes
from ..support.lock import locked
from ..support.progress import Progress
from ..support.quiet import quiet_libraries
from ..support.text import rounded_bytes
from ..teacher.load import open_tokenizer
from ..teacher.logits_store import SHARD_BYTES, LogitsWriter, position_bytes, row_digests
from ..teacher.signals import OnlineTeacher
from ..training.precision import precision_context
from ..training.process_group import Distributed
from ..training.stop_signal import sigterm_interrupts


def distillation_plan(config: Config, name: str, ranks: int = 1) -> StagePlan:
    """Return the plan of a stage that follows a teacher, with the rows that it reads and for this process alone.

    Args:
        config: of the run.
        name: of the stage.
        ranks: processes that are to train: where `batch.tokens` is left out, steps have a row for each of them.

    Raises:
        UserError: there is no such stage, or its objective has no teacher.
    """
    following = [n for n, stage in config.stages.items() if objective_class(stage.objective).follows_teacher]
    if name not in following:
        raise UserError(f"{name!r} is not a stage that follows a teacher", f"stages that do: {', '.join(following)}")
    return resolve(with_steps(config, [name], ranks), [name]).stage(name)


@sigterm_interrupts()
def write_logits(plan: StagePlan, out: Path, k: int, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the logits of a stage, or what is missing of them.

    Args:
        plan: of the stage.
        out: directory.
        k: tokens of each position.
        shard_bytes: about what a file is to have.

    Raises:
        UserError: there is no space, other logits are in the directory, or another process writes to it; `Interrupted`
            by ctrl-C, with whole shards kept.
    """
    with locked(out):
        _write(plan, out, k, shard_bytes)


def _write(plan: StagePlan, out: Path, k: int, shard_bytes: int) -> None:
    """Write what is missing, into a directory that no other process writes to."""
    quiet_libraries()
    device = plan.run.device
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but PyTorch finds no CUDA device", "use device=cpu, or see rwkvinside doctor")
    world, tokenizer = Distributed(device), open_tokenizer(plan.run.teacher)
    check_model(plan, tokenizer)
    teacher = online_teacher(plan, world)
    vocab = shared_vocab(plan)
    if not 1 <= k < vocab:
        raise UserError(f"--k {k}", f"allowed: 1 to {vocab - 1}, one less than the vocabulary")
    tokens, _ = tokens_of(plan.run.data, plan.settings.data, plan.run.endless_tokens, tokenizer, vocab, world)
    rows = rows_of(plan, tokens)
    row_bytes = plan.length.seq_len * position_bytes(k)
    count = plan.row_count
    digests = FileDigests(out / DIGESTS)
    writer = LogitsWriter(
        out,
        cache_identity(plan, tokenizer, digests) | {"data": data_hash(rows)},
        k=k,
        vocab=vocab,
        rows=count,
        rows_per_shard=max(1, shard_bytes // row_bytes),
    )
    digests.save()
    missing = writer.missing()
    left = sum(map(len, missing))
    written = count - left
    progress = Progress(plan.name, count, unit="rows", done=written, stream=sys.stdout)
    size = rounded_bytes(left * row_bytes)
    progress.say(f"{plan.name}: {left:,} of {count:,} rows to write, at most {size}, to {out}")
    if left * row_bytes > (free := free_bytes(out)):
        raise UserError(f"{out} has {rounded_bytes(free)} free", "free some space, or lower --k or the stage's tokens")

    def advance(more: int) -> None:
        progress.advance(more, f"{progress.rate * plan.length.seq_len:,.0f} tokens/s")

    try:
        with progress:
            for shard in missing:
                with precision_context(plan.run.precision, world.device):
                    micro_rows, temperature = plan.shape.micro_rows, plan.loss.temperature
                    writer.write(shard, *_shard(teacher, rows, shard, micro_rows, vocab, k, temperature, advance))
                written += len(shard)
    except KeyboardInterrupt as error:
        if not written:
            raise
        raise Interrupted(f"stopped with {written:,} of {count:,} rows", "the same command again goes on") from error
    progress.say(f"{plan.name}: {written:,} of {count:,} rows are in {out}")


def _shard(
    teacher: OnlineTeacher,
    rows: Rows,
    numbers: range,
    micro_rows: int,
    vocab: int,
    k: int,
    temperature: float,
    progress: Callable[[int], None],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `LogitsWriter.write` takes, for the rows of one shard.

    They are computed `micro_rows` at a time.
    """
    ids, log_probs, counts, digests = [], [], [], []
    for start in range(numbers.start, numbers.stop, micro_rows):
        batch = rows.batch(range(start, min(start + micro_rows, numbers.stop)))
        counts.append((batch.labels != IGNORE).sum(1))
        digests.append(row_digests(batch))
        for top_ids, top in _top(teacher, batch.to(next(teacher.module.parameters()).device), vocab, k, temperature):
            ids.append(top_ids.cpu())
            log_probs.append(top.cpu())
        progress(len(batch.rows))
    return torch.cat(ids), torch.cat(log_probs), torch.cat(counts), torch.cat(digests)


def _top(
    teacher: OnlineTeacher, batch: Batch, vocab: int, k: int, temperature: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ids (n, k) and log-probabilities (n, k + 1) of the positions with a label.

    Chunk by chunk; the log-probability of the rest comes last.
    """
    for chunk in teacher.signal(None, batch).chunks(chunk_tokens(vocab)):
        top = chunk.distribution(slice(None), vocab, temperature).top(k)
        del chunk  # before the next one is made
        yield top.ids.int(), top.log_probs.half()
