"""Where the teacher's side of a distillation comes from: the student's own frozen weights, a model of its own, or
logits that were written to disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data.batch import IGNORE, Batch, attention_mask_4d
from ..errors import UserError
from ..hybrid.lm_head import Readout, open_head, wide
from ..losses.distillation import Chunk, Targets
from ..losses.divergence import Target
from .logits_store import LogitsReader


class Teacher(Protocol):
    """A source of distributions for the positions of a batch that have a label."""

    def targets(self, model, batch: Batch) -> Targets:
        """Called before the student's forward; its result is used within the student's readout."""
        ...

    def close(self) -> None:
        """The stage is over."""


class SelfTeacher(Teacher):
    """The hybrid in teacher mode: one model in memory. Exact only while nothing but mixers and adapters trained."""

    def targets(self, model, batch: Batch) -> Targets:
        chosen = batch.labels != IGNORE
        hidden = model(batch, mode="teacher", readout=lambda hidden, head: hidden[chosen])
        return HeadTargets(hidden, lambda: model.teacher_logits)


class OnlineTeacher(Teacher):
    """A frozen model beside the student, of the same tokenizer but possibly another size.

    Args:
        module: a `TeacherModel`, or what an engine that shards weights made of it.
        whole: the context in which such an engine keeps the head's weights together.
        release: what such an engine wants done at the end.
    """

    def __init__(
        self,
        module: nn.Module,
        whole: Callable[[], AbstractContextManager] = nullcontext,
        release: Callable[[], None] | None = None,
    ):
        self.module, self._whole, self._release = module, whole, release

    def close(self) -> None:
        if self._release is not None:
            self._release()

    @torch.no_grad()
    def targets(self, model, batch: Batch) -> Targets:
        chosen = batch.labels != IGNORE
        hidden = self.module(batch, lambda hidden, head: hidden[chosen])
        return HeadTargets(hidden, lambda: open_head(self.module.readout.head).forward, self._whole)


class TeacherModel(nn.Module):
    """A frozen causal language model that reads packed batches as `HybridModel` does."""

    def __init__(self, lm: PreTrainedModel):
        super().__init__()
        self.lm = lm.requires_grad_(False).eval()
        self.readout = Readout(lm.lm_head)

    def forward(self, batch: Batch, function: Callable[[Tensor, nn.Module], object]):
        """The result of `function` on the final hidden states (B, T, D) and the head."""
        whole_rows = bool((batch.segment_ids == 1).all())
        hidden = self.lm.model(
            input_ids=batch.input_ids,
            attention_mask=None if whole_rows else attention_mask_4d(batch),
            position_ids=batch.position_ids,
            use_cache=False,
        ).last_hidden_state
        return self.readout(hidden, function)


class HeadTargets:
    """Distributions from a teacher's final hidden states, whose logits are made a chunk at a time.

    Args:
        hidden: (N, D) at the positions with a label.
        head: gives the function from hidden states to logits; called once, inside of `whole`.
        whole: see `OnlineTeacher`.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Callable[[], Callable[[Tensor], Tensor]],
        whole: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self._hidden, self._head, self._whole = hidden, head, whole

    @contextmanager
    def open(self) -> Iterator[Callable[[slice], Chunk]]:
        with self._whole():
            yield partial(self._chunk, self._head())

    @torch.no_grad()
    def _chunk(self, head: Callable[[Tensor], Tensor], part: slice) -> Chunk:
        return partial(_target, head(self._hidden[part]))


@torch.no_grad()
def _target(logits: Tensor, rows: slice, vocab: int, temperature: float) -> Target:
    logits = logits[rows, :vocab]
    logits = logits.to(wide(logits.dtype))
    best = logits.argmax(-1)
    if temperature != 1:
        logits = logits / temperature
    return Target(F.log_softmax(logits, -1), None, best, logits.shape[1])


class OfflineTeacher(Teacher):
    """The most likely tokens of a teacher that is not here any more; see `rwkvinside data logits`.

    Args:
        reader: of the rows of this stage; it was checked against teacher, tokenizer and data.
    """

    def __init__(self, reader: LogitsReader):
        self.reader = reader

    def targets(self, model, batch: Batch) -> Targets:
        return CachedTargets(*(part.to(batch.labels.device) for part in self.reader.batch(batch)), self.reader.vocab)


class CachedTargets:
    """Distributions over k tokens and the rest, by position.

    Args:
        ids: (N, k) integers, the likeliest first.
        log_probs: (N, k + 1), the rest last; any float type.
        vocab: they are over the ids below this.
    """

    def __init__(self, ids: Tensor, log_probs: Tensor, vocab: int):
        self._ids, self._log_probs, self._vocab = ids, log_probs, vocab

    def open(self) -> AbstractContextManager[Callable[[slice], Chunk]]:
        return nullcontext(lambda part: partial(self._target, self._ids[part].long(), self._log_probs[part]))

    def _target(self, ids: Tensor, log_probs: Tensor, rows: slice, vocab: int, temperature: float) -> Target:
        # whoever opened the cache has seen that vocabulary and temperature are those of the stage;
        # rounding to 16 bits left sums that are not quite 1
        return Target(F.log_softmax(log_probs[rows].float(), -1), ids[rows], ids[rows, 0], self._vocab)


def check_same_weights(changed: list[str]) -> None:
    """Refuse the one-model teacher when something that the teacher also uses has been trained.

    Args:
        changed: see `HybridModel.teacher_changes`.

    Raises:
        UserError: names the first such parameter.
    """
    if changed:
        raise UserError(
            f"teacher: same cannot be used: {changed[0]} (and {len(changed) - 1} more) was trained, in the teacher too",
            "use teacher: separate, or train only mixer groups and adapters",
        )
