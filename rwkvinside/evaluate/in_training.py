"""How close a student in training is to its teacher: the scores of `quality`, within the model's forward and a chunk of
logits at a time, shared by all processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..data.batch import IGNORE, Batch
from ..losses.distillation import chunk_tokens
from ..teacher.signals import Teacher
from .quality import Scores, Totals, means, token_scores


def share(batches: Sequence[Batch], rank: int, size: int) -> list[Batch]:
    """A rank's part of the batches: as many as any other rank has, because forwards may be collective; what fills up
    has no label."""
    own = list(batches[rank::size])
    if len(own) * size < len(batches):
        own.append(replace(batches[-1], labels=torch.full_like(batches[-1].labels, IGNORE)))
    return own


@torch.no_grad()
def evaluate_student(
    model: nn.Module,
    teacher: Teacher | None,
    batches: Sequence[Batch],
    device: torch.device,
    total: Callable[[Sequence[float]], list[float]] = list,
) -> Scores:
    """Compare a student with its teacher on whole documents.

    Args:
        model: a `HybridModel`, or what an engine made of it.
        teacher: None: the student's own cross-entropy alone is meant (the other numbers say nothing).
        batches: this process's `share`, one document per row.
        total: adds up over processes.

    Raises:
        UserError: no token can be judged.
    """
    totals = Totals()
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        for batch in batches:
            _add(totals, model, teacher, batch.to(device))
    finally:
        for module in training:
            module.training = True
    return means(total(totals.sums.sum(1).tolist()))


def _add(totals: Totals, model: nn.Module, teacher: Teacher | None, batch: Batch) -> None:
    judged = batch.labels != IGNORE
    labels, context = batch.labels[judged], judged.nonzero()[:, 1] + 1
    targets = None if teacher is None else teacher.targets(model, batch)

    def readout(hidden: Tensor, head: nn.Module) -> Tensor:
        hidden, vocab = hidden[judged], head.out_features
        scores = [hidden.new_zeros(4, 0, dtype=torch.float32)]
        with nullcontext() if targets is None else targets.open() as chunk:
            size = chunk_tokens(vocab)
            for part in (slice(i, i + size) for i in range(0, len(labels), size)):
                logits = head.forward(hidden[part])
                wanted = logits if chunk is None else chunk(part)(slice(None), vocab, 1.0).log_probs
                shared = wanted.shape[-1]
                scores.append(token_scores(logits[:, :shared], wanted, labels[part]))
        return torch.cat(scores, 1)

    totals.add(model(batch, mode="student", readout=readout).cpu().numpy(), context.cpu().numpy())
