"""Where the teacher's side of a distillation comes from.

It comes from the student's own frozen weights, a second model, or logits that were written to disk.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data.batch import Batch
from ..families.registry import find
from ..hybrid.document_attention import attend_within_documents, run_backbone
from ..hybrid.lm_head import Head, logits_function, shaped, wide
from ..losses.chunked import TeacherChunk, TeacherSignal, chunk_slices
from ..losses.divergence import TeacherDistribution
from .logits_store import LogitsReader


class Teacher(Protocol):
    """A source of distributions for the positions of a batch that have a label."""

    def signal(self, model: nn.Module | None, batch: Batch) -> TeacherSignal:
        """Return the teacher's side of a batch.

        Asked for before the student's forward, in which it is used.

        Args:
            model: the student, or what an engine made of it; only `SelfTeacher` asks it.
            batch: packed rows, on the model's device.
        """
        ...

    def close(self) -> None:
        """Release what the teacher holds, at the end of the stage."""
        return


class SelfTeacher(Teacher):
    """The hybrid in teacher mode: one model in memory.

    Exact only while nothing but mixers and adapters was trained.
    """

    def signal(self, model: nn.Module | None, batch: Batch) -> TeacherSignal:
        """Return the distributions of mode "teacher", without adapters."""
        return HeadSignal(batch.targets.take(model(batch, mode="teacher")), model.teacher_head)


class OnlineTeacher(Teacher):
    """A frozen model next to the student, of the same tokenizer.

    Args:
        module: a `TeacherModel`, or what an engine that shards weights made of it.
        gathered: the context in which such an engine keeps the head's weights gathered.
        release: closes such an engine.
    """

    def __init__(
        self,
        module: nn.Module,
        gathered: Callable[[], AbstractContextManager] = nullcontext,
        release: Callable[[], None] | None = None,
    ):
        self.module, self._gathered, self._release = module, gathered, release

    def close(self) -> None:
        """Close the engine, if there is one."""
        if self._release is not None:
            self._release()

    @torch.no_grad()
    def signal(self, model: nn.Module | None, batch: Batch) -> TeacherSignal:
        """Return the distributions of the second model."""
        return HeadSignal(batch.targets.take(self.module(batch)), self.module.head, self._gathered)


class OfflineTeacher(Teacher):
    """The most likely tokens of a teacher, from disk; see `rwkvinside data logits`.

    Args:
        reader: of the rows of this stage, checked against teacher, tokenizer and data.
    """

    def __init__(self, reader: LogitsReader):
        self.reader = reader

    def signal(self, model: nn.Module | None, batch: Batch) -> TeacherSignal:
        """Return the distributions that were stored for the batch."""
        ids, log_probs = (tensor.to(batch.labels.device) for tensor in self.reader.batch(batch))
        return StoredSignal(ids, log_probs, self.reader.vocab)


class TeacherModel(nn.Module):
    """A frozen causal language model that reads packed batches as `HybridModel` does."""

    def __init__(self, lm: PreTrainedModel):
        super().__init__()
        self.lm = attend_within_documents(lm).requires_grad_(False).eval()
        self._family = find(lm.config.model_type)

    @property
    def head(self) -> Head:
        """The output head, which gives the model's logits."""
        return shaped(self._family.head(self.lm), self._family.logit_shape(self.lm.config))

    def forward(self, batch: Batch) -> Tensor:
        """Return the final hidden states (B, T, D)."""
        return run_backbone(self.lm, batch)


@dataclass(frozen=True)
class HeadSignal(TeacherSignal):
    """Distributions from a teacher's final hidden states.

    Their logits are made a chunk at a time.

    Attributes:
        hidden: (N, D) at the positions with a label.
        head: from hidden states to logits.
        gathered: see `OnlineTeacher`; entered once for all chunks.
    """

    hidden: Tensor
    head: Head
    gathered: Callable[[], AbstractContextManager] = nullcontext

    def chunks(self, size: int) -> Generator[TeacherChunk, None, None]:
        """Yield the chunks of `chunk_slices`, each made when it is asked for."""
        with self.gathered():
            logits_of = logits_function(self.head)
            for positions in chunk_slices(len(self.hidden), size):
                yield self._chunk(logits_of, positions)

    @torch.no_grad()  # not around the generator: that would hold each chunk until the next one is made
    def _chunk(self, logits_of: Callable[[Tensor], Tensor], positions: slice) -> TeacherChunk:
        return _LogitsChunk(logits_of(self.hidden[positions]))


@dataclass(frozen=True)
class _LogitsChunk(TeacherChunk):
    logits: Tensor

    @torch.no_grad()
    def distribution(self, positions: slice, vocab: int, temperature: float) -> TeacherDistribution:
        logits = self.logits[positions, :vocab]
        logits = logits.to(wide(logits.dtype))
        best = logits.argmax(-1)
        if temperature != 1:
            logits = logits / temperature
        return TeacherDistribution(F.log_softmax(logits, -1), None, best, logits.shape[1])


@dataclass(frozen=True)
class StoredSignal(TeacherSignal):
    """Distributions over k tokens and the rest, by position.

    Attributes:
        ids: (N, k) integers, the likeliest first.
        log_probs: (N, k + 1), the rest last; any float type.
        vocab: they are over the ids below this.
    """

    ids: Tensor
    log_probs: Tensor
    vocab: int

    def chunks(self, size: int) -> Generator[TeacherChunk, None, None]:
        """Yield the chunks of `chunk_slices`."""
        for positions in chunk_slices(len(self.ids), size):
            yield _StoredChunk(self.ids[positions].long(), self.log_probs[positions], self.vocab)


@dataclass(frozen=True)
class _StoredChunk(TeacherChunk):
    ids: Tensor
    log_probs: Tensor
    vocab: int
    logits = None

    def distribution(self, positions: slice, vocab: int, temperature: float) -> TeacherDistribution:
        # vocabulary and temperature were checked against the stage when the cache was opened; rounding to 16 bits left
        # sums that are not quite 1
        log_probs = F.log_softmax(self.log_probs[positions].float(), -1)
        return TeacherDistribution(log_probs, self.ids[positions], self.ids[positions, 0], self.vocab)
