"""How close a student is to its teacher on text: KL divergence, cross entropies, agreement, all also by position.

Each document is evaluated alone. Takes any two Hugging Face causal language models; loads and prints nothing.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data.batch import IGNORE, Batch
from ..errors import UserError

CHUNK_ELEMENTS = 2**25  # logits in one fp32 chunk (128 MiB); a vocabulary of 152k gives chunks of 220 tokens


Logits = Callable[[Batch], Tensor]
"""Batch -> (B, T, V) logits, any float dtype, on any device."""


@dataclass(frozen=True)
class Scores:
    """Mean scores over all predicted tokens.

    Attributes:
        tokens: how many were predicted.
        kl: KL(teacher || student) in nats.
        ce, ce_teacher: cross entropies of student and teacher in nats.
        agreement: share of tokens whose likeliest id is the same.
    """

    tokens: int
    kl: float
    ce: float
    ce_teacher: float
    agreement: float

    @property
    def perplexity(self) -> float:
        """Perplexity of the student: exp(ce)."""
        return math.exp(self.ce)

    @property
    def perplexity_teacher(self) -> float:
        """Perplexity of the teacher: exp(ce_teacher)."""
        return math.exp(self.ce_teacher)

    def to_dict(self) -> dict[str, float]:
        """Return plain JSON, with the perplexities."""
        return {**asdict(self), "perplexity": self.perplexity, "perplexity_teacher": self.perplexity_teacher}


class PositionBucket(NamedTuple):
    """Scores of the predictions after `first` to `last` tokens of a document."""

    first: int
    last: int
    scores: Scores


@dataclass(frozen=True)
class Evaluation:
    """Result of comparing two models.

    Attributes:
        documents: how many had a token to predict.
        shared_vocab: ids that both models have.
        scores: over all tokens.
        by_position: the buckets 1, 2-3, 4-7, 8-15, ... with at least one token.
        control: scores of the student's control in its place, None without one; see `hybrid.document_attention`.
    """

    documents: int
    shared_vocab: int
    scores: Scores
    by_position: tuple[PositionBucket, ...]
    control: Scores | None = None

    def to_dict(self) -> dict:
        """Return plain JSON: scores at the top level, buckets under "by_position", and "control" if there is one."""
        buckets = [{"first": b.first, "last": b.last, **b.scores.to_dict()} for b in self.by_position]
        return {
            "documents": self.documents,
            "shared_vocab": self.shared_vocab,
            **self.scores.to_dict(),
            "by_position": buckets,
            **({} if self.control is None else {"control": self.control.to_dict()}),
        }


def token_scores(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Compare two sets of logits token by token, in fp32.

    Args:
        student, teacher: (tokens, V) logits over the same ids, any float dtype.
        labels: (tokens,) int64 targets below V.

    Returns:
        (4, tokens) fp32: KL(teacher || student), CE of the student, CE of the teacher, 1 where the likeliest ids agree.
    """
    log_q = student.float().log_softmax(-1)
    log_p = teacher.float().log_softmax(-1)
    # A logit of -inf (an id that the teacher forbids) has p = 0 and must contribute 0, not 0 * inf.
    kl = torch.where(log_p > -math.inf, log_p.exp() * (log_p - log_q), 0.0).sum(-1)
    targets = labels[:, None]
    ce = -log_q.gather(-1, targets)[:, 0]
    ce_teacher = -log_p.gather(-1, targets)[:, 0]
    agree = (log_q.argmax(-1) == log_p.argmax(-1)).float()
    return torch.stack([kl, ce, ce_teacher, agree])


def means(sums: Sequence[float]) -> Scores:
    """Return mean scores.

    Args:
        sums: the number of tokens, then the four sums of `token_scores`.

    Raises:
        UserError: no token.
    """
    count, kl, ce, ce_teacher, agree = sums
    if not count:
        raise UserError("the evaluation data has no token to predict", "give documents of at least two tokens")
    return Scores(int(count), kl / count, ce / count, ce_teacher / count, agree / count)


class Totals:
    """Sums of scores by context length.

    Attributes:
        sums: (5, longest context + 1) float64; row 0 counts tokens, rows 1-4 are the sums of `token_scores`.
    """

    def __init__(self) -> None:
        self.sums = np.zeros((5, 0))

    def add(self, scores: np.ndarray, context: np.ndarray) -> None:
        """Add tokens.

        Args:
            scores: (4, tokens) from `token_scores`.
            context: (tokens,) integers, tokens read before each prediction.
        """
        longest = int(context.max(initial=0)) + 1
        if longest > self.sums.shape[1]:
            self.sums = np.pad(self.sums, ((0, 0), (0, longest - self.sums.shape[1])))
        for row, values in enumerate((np.ones(len(context)), *scores)):
            self.sums[row, :longest] += np.bincount(context, weights=values.astype(np.float64), minlength=longest)

    def scores(self, first: int = 0, last: int | None = None) -> Scores:
        """Return the means over contexts of `first` to `last` tokens (inclusive)."""
        return means(self.sums[:, first : None if last is None else last + 1].sum(1))

    def buckets(self) -> tuple[PositionBucket, ...]:
        """Return the scores by context of doubling length, without empty buckets."""
        length = self.sums.shape[1]
        bounds = [(2**k, min(2 ** (k + 1), length) - 1) for k in range(length.bit_length()) if 2**k < length]
        return tuple(PositionBucket(a, b, self.scores(a, b)) for a, b in bounds if self.sums[0, a : b + 1].any())


def evaluate_models(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Iterable[Batch],
    *,
    control: Logits | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Compare a student with its teacher, each document alone.

    Both models are in eval mode during the call.

    Args:
        student, teacher: any two Hugging Face causal language models, each on its own device.
        batches: right-padded batches with one document per row, see `document_batches`.
        control: logits of the student's control, which is compared with the teacher too.
        progress: called after every batch with its number of documents.

    Raises:
        UserError: there is no token to predict, or a token is not an id of both models.
        ValueError: a row holds more than one document.
    """
    models = (student, teacher)
    was_training = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        return compare(
            lambda batch: _model_logits(student, batch),
            lambda batch: _model_logits(teacher, batch),
            _checked(batches, *models),
            control=control,
            progress=progress,
        )
    finally:
        for model, training in zip(models, was_training, strict=True):
            model.train(training)


@torch.no_grad()
def compare(
    student: Logits,
    teacher: Logits,
    batches: Iterable[Batch],
    *,
    control: Logits | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Compare two sources of logits as `evaluate_models` compares models.

    Only the ids that both have are compared: families pad their vocabularies differently, and padding carries no text.
    """
    compared = [(student, Totals()), *([] if control is None else [(control, Totals())])]
    documents, shared = 0, 0
    for batch in batches:
        if int(batch.segment_ids.max()) > 1:
            raise ValueError("a row holds more than one document; each document has to be evaluated alone")
        labeled = batch.labels != IGNORE
        wanted = teacher(batch)
        for model, totals in compared:  # no more than two models' logits at a time
            shared = _add(totals, model(batch), wanted, batch)
        count = int(labeled.any(1).sum())
        documents += count
        if progress is not None:
            progress(count)
    (totals, *rest) = [totals for _, totals in compared]
    return Evaluation(documents, shared, totals.scores(), totals.buckets(), rest[0].scores() if rest else None)


def _add(totals: Totals, student: Tensor, teacher: Tensor, batch: Batch) -> int:
    """Add the scores of a batch's (B, T, V) logits; return how many ids both have."""
    shared, device = min(student.shape[-1], teacher.shape[-1]), student.device
    rows, columns = (batch.labels != IGNORE).nonzero(as_tuple=True)
    for at in zip(*(index.split(max(1, CHUNK_ELEMENTS // shared)) for index in (rows, columns)), strict=True):
        chunk = [x[at[0].to(x.device), at[1].to(x.device), :shared].to(device) for x in (student, teacher)]
        scores = token_scores(*chunk, batch.labels[at].to(device))
        totals.add(scores.cpu().numpy(), at[1].cpu().numpy() + 1)
    return shared


def _model_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    mask = batch.mask.to(model.device).long()
    return model(input_ids=batch.input_ids.to(model.device), attention_mask=mask, use_cache=False).logits


def _checked(batches: Iterable[Batch], student: PreTrainedModel, teacher: PreTrainedModel) -> Iterator[Batch]:
    sizes = [model.get_input_embeddings().weight.shape[0] for model in (student, teacher)]
    for batch in batches:
        largest = max(int(batch.input_ids.max()), int(batch.labels.max()))
        if largest >= min(sizes):
            raise UserError(
                f"token id {largest} is not an id of both models (student {sizes[0]}, teacher {sizes[1]})",
                "use the tokenizer that both models were trained with",
            )
        yield batch
