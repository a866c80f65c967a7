"""How close a student in training is to its teacher.

Computes the scores of `quality` within the model's forward, a chunk of logits at a time, shared by all processes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..data.batch import IGNORE, Batch, Targets
from ..hybrid.carried_rows import CarriedRows
from ..hybrid.lm_head import Head, logits_function
from ..hybrid.row_states import RowStates
from ..losses.chunked import TeacherChunk, TeacherSignal, chunk_slices, chunk_tokens, open_chunks
from ..teacher.signals import Teacher
from .quality import Scores, Totals, means, token_scores


def share(batches: Sequence[Batch], rank: int, size: int) -> list[Batch]:
    """Return a rank's share of the batches.

    Every rank gets the same number, because forwards may be collective; batches that fill up have no labels.
    """
    batches_of_rank = list(batches[rank::size])
    if len(batches_of_rank) * size < len(batches):
        batches_of_rank.append(replace(batches[-1], labels=torch.full_like(batches[-1].labels, IGNORE)))
    return batches_of_rank


@contextmanager
def judging(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for the time of the block."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def evaluate_student(
    model: nn.Module,
    teacher: Teacher | None,
    batches: Sequence[Batch],
    device: torch.device,
    total: Callable[[Sequence[float]], list[float]] = list,
    mode: str = "student",
    states: RowStates | None = None,
    progress: Callable[[], object] = lambda: None,
) -> Scores:
    """Compare a student with its teacher on whole documents.

    Args:
        model: a `HybridModel`, possibly wrapped by an engine.
        teacher: None compares the student with itself; then only its cross-entropy is meaningful.
        batches: this process's `share`, one document per row.
        device: where the model is.
        total: sums over processes.
        mode: of the model; "control" compares the student's control in its place.
        states: the rows go on from batch to batch, from these; None: they begin anew.
        progress: called after every batch.

    Raises:
        UserError: there is no token to predict.
    """
    totals = Totals()
    with judging(model):
        for batch in batches:
            batch = batch.to(device)
            if states is None:
                _add(totals, model, teacher, batch, mode)
            else:
                carried = states.enter(batch)
                _add(totals, model, teacher, batch, mode, carried)
                states.leave(batch, carried)
            progress()
    return means(total(totals.sums.sum(1).tolist()))


def _add(
    totals: Totals,
    model: nn.Module,
    teacher: Teacher | None,
    batch: Batch,
    mode: str,
    carried: CarriedRows | None = None,
) -> None:
    context = batch.targets.positions % batch.labels.shape[1] + 1
    signal = None if teacher is None else teacher.signal(model, batch)
    scores = model(batch, mode=mode, task=TokenScores(signal), carried=carried)
    totals.add(scores.cpu().numpy(), context.cpu().numpy())


@dataclass(frozen=True)
class TokenScores:
    """Task of `LMHeadLoss` that computes the `token_scores` of labeled positions.

    Attributes:
        signal: of the teacher; None compares the student with itself.
    """

    signal: TeacherSignal | None

    def run(self, head: Head, hidden: Tensor, targets: Targets) -> Tensor:
        """Return the scores of the N labeled positions, (4, N), chunk by chunk."""
        hidden, logits_of = targets.take(hidden), logits_function(head)
        size, scores = chunk_tokens(head.out_features), []
        with open_chunks(self.signal, size) as chunks:
            for positions in chunk_slices(len(hidden), size):
                logits = logits_of(hidden[positions])
                teacher = logits if self.signal is None else _log_probs(next(chunks), head.out_features)
                scores.append(token_scores(logits[:, : teacher.shape[1]], teacher, targets.labels[positions]))
        return torch.cat(scores, 1)


@torch.no_grad()
def continuation(
    model: nn.Module,
    teacher: Teacher | None,
    ids: Sequence[int],
    tokens: int,
    end: Collection[int],
    device: torch.device,
    progress: Callable[[], object] = lambda: None,
) -> list[int]:
    """Return the likeliest tokens after a beginning, of a student in training or of its teacher.

    The whole text is read again for each token, so that it needs no cache and runs on every engine; all processes take
    part with the same arguments.

    Args:
        model: a `HybridModel` in evaluation mode, possibly wrapped by an engine.
        teacher: who writes; None: the student.
        ids: the beginning, at least one.
        tokens: how many follow, at most.
        end: ids of which each ends the text, and is left out.
        device: where the model is.
        progress: called after every token.
    """
    written: list[int] = []
    while len(written) < tokens:
        text = torch.tensor([[*ids, *written]], device=device)
        last = torch.full_like(text, IGNORE)
        last[:, -1] = text[:, -1]  # any label: what follows the last token is asked for
        positions = torch.arange(text.shape[1], device=device)[None]
        batch = Batch(text, last, positions, torch.ones_like(text, dtype=torch.int32), (0,))
        signal = None if teacher is None else teacher.signal(model, batch)
        token = int(model(batch, mode="student", task=Likeliest(signal)))
        progress()
        if token in end:
            break
        written.append(token)
    return written


@dataclass(frozen=True)
class Likeliest:
    """Task of `LMHeadLoss` that returns the likeliest tokens at labeled positions.

    Attributes:
        signal: of the teacher, whose tokens they are; None: the student's.
    """

    signal: TeacherSignal | None

    def run(self, head: Head, hidden: Tensor, targets: Targets) -> Tensor:
        """Return the tokens (N,) of the N labeled positions, few enough for one chunk."""
        if self.signal is None:
            return logits_function(head)(targets.take(hidden)).argmax(-1)
        with open_chunks(self.signal, chunk_tokens(head.out_features)) as chunks:
            return _log_probs(next(chunks), head.out_features).argmax(-1)


def _log_probs(chunk: TeacherChunk, vocab: int) -> Tensor:
    return chunk.distribution(slice(None), vocab, temperature=1.0).log_probs
