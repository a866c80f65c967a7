"""`rwkvinside data logits`: a teacher's likeliest tokens for the rows of a distillation stage, written to disk."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from ..config.precision import device_and_precision, teacher_dtype
from ..config.schema import Config, StageConfig
from ..data.batch import IGNORE, Batch
from ..data.sources import tokens_of
from ..errors import Interrupted, UserError
from ..losses.distillation import chunk_tokens
from ..stages.rows import Rows, rows_of
from ..support.text import rounded_bytes
from ..teacher.build import separate_teacher
from ..teacher.load import load_tokenizer
from ..teacher.logits_check import cache_identity, check_tokenizer, data_hash, shared_vocab
from ..teacher.logits_store import SHARD_BYTES, LogitsWriter, position_bytes, row_digests
from ..teacher.signals import OnlineTeacher
from ..training.batching import micro_rows
from ..training.metrics import Console
from ..training.precision import precision_context
from ..training.process_group import Distributed


def write_logits(config: Config, name: str, out: str | Path | None, k: int, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the logits of a stage, or what is missing of them.

    Args:
        out: directory; None is the stage's `teacher_cache`.
        k: tokens of each position.
        shard_bytes: about what a file is to have.

    Raises:
        UserError: no such stage, no directory, other logits in it, no space; `Interrupted` by ctrl-C, with whole
            shards kept.
    """
    stage = _stage(config, name)
    out = out or stage.teacher_cache
    if out is None:
        hint = f"name a directory with --out, or stages.{name}.teacher_cache"
        raise UserError("nowhere to write the logits to", hint)
    out = Path(out)
    disable_progress_bar()
    device, precision = device_and_precision(config)
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but PyTorch finds no CUDA device", "use device=cpu, or see rwkvinside doctor")
    world, tokenizer = Distributed(device), load_tokenizer(config)
    check_tokenizer(config, stage, tokenizer)
    teacher = separate_teacher(config, stage, world, teacher_dtype(config, device, precision), launched=False)
    vocab = shared_vocab(config, stage)
    if not 1 <= k < vocab:
        raise UserError(f"--k {k}", f"allowed: 1 to {vocab - 1}, one less than the vocabulary")
    tokens, _ = tokens_of(config, stage, tokenizer, vocab, world)
    rows = rows_of(config, name, tokens)
    row_bytes = stage.data.seq_len * position_bytes(k)
    count = stage.steps * stage.rows
    writer = LogitsWriter(
        out,
        cache_identity(config, name, tokenizer) | {"data": data_hash(rows)},
        k=k,
        vocab=vocab,
        rows=count,
        rows_per_shard=max(1, shard_bytes // row_bytes),
    )
    missing = writer.missing()
    left = sum(map(len, missing))
    console = Console("logits", 1)
    console.say(f"{name}: {left:,} of {count:,} rows to write, at most {rounded_bytes(left * row_bytes)}, to {out}")
    if left * row_bytes > (free := shutil.disk_usage(out).free):
        raise UserError(f"{out} has {rounded_bytes(free)} free", "free some space, or lower --k or the stage's tokens")
    progress = _Progress(console, count, left, stage.data.seq_len)
    try:
        for part in missing:
            with precision_context(precision, world.device):
                size, heat = micro_rows(stage, 1), stage.loss.temperature
                writer.write(part, *_shard(teacher, rows, part, size, vocab, k, heat, progress.add))
            progress.kept = progress.done
        if missing:
            progress.say()
    except KeyboardInterrupt as error:
        kept = count - left + progress.kept
        raise Interrupted(f"stopped with {kept:,} of {count:,} rows", "the same command again goes on") from error


def _stage(config: Config, name: str) -> StageConfig:
    stage = config.stages.get(name)
    if stage is None or stage.objective != "distill":
        distill = [other for other, its in config.stages.items() if its.objective == "distill"]
        raise UserError(f"{name!r} is no stage with objective distill", f"those are: {', '.join(distill)}")
    return stage


@dataclass
class _Progress:
    """A line every ten seconds.

    Args:
        count, left: rows of the stage, and of these still to be written when it began.
        row_tokens: tokens of a row.

    Attributes:
        done, kept: rows since then, and of these in whole shards.
    """

    console: Console
    count: int
    left: int
    row_tokens: int
    done: int = 0
    kept: int = 0
    start: float = field(default_factory=time.perf_counter)
    said: float = field(default_factory=time.perf_counter)

    def add(self, rows: int) -> None:
        self.done += rows
        if time.perf_counter() - self.said > 10:
            self.say()

    def say(self) -> None:
        self.said = time.perf_counter()
        speed = self.done / (self.said - self.start)
        rows = f"{self.count - self.left + self.done:,}/{self.count:,} rows"
        left = (self.left - self.done) / speed if speed else 0.0
        self.console.say(f"{rows}  {speed * self.row_tokens:,.0f} tokens/s  {left / 60:.3g} min left")


def _shard(
    teacher: OnlineTeacher,
    rows: Rows,
    part: range,
    size: int,
    vocab: int,
    k: int,
    temperature: float,
    progress: Callable[[int], None],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `LogitsWriter.write` takes, for some rows, `size` at a time."""
    ids, log_probs, counts, digests = [], [], [], []
    for start in range(part.start, part.stop, size):
        batch = rows.batch(range(start, min(start + size, part.stop)))
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
    """ids (n, k) and log-probabilities (n, k + 1) of the positions with a label, chunk by chunk."""
    with teacher.targets(None, batch).open() as chunk:
        for start in range(0, batch.num_targets, chunk_tokens(vocab)):
            target = chunk(slice(start, start + chunk_tokens(vocab)))(slice(None), vocab, temperature).top(k)
            yield target.ids.int(), target.log_probs.half()
