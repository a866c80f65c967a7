"""How a student writes: next to its teacher on the same prompts, greedily, so that the result is one text each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from transformers import PreTrainedModel

from ..teacher.sampling import Advance, Sampling, sample

ROWS = 16
NGRAM = 4


@dataclass(frozen=True)
class Writing:
    """What a model wrote after the prompts.

    Attributes:
        mean_length: tokens, without the one that ends a text.
        no_end: share of texts that reached the limit without ending.
        repetition: share of the 4-grams that are repeated within their text; 0 where there are none.
    """

    mean_length: float
    no_end: float
    repetition: float


@dataclass(frozen=True)
class GenerationComparison:
    """Texts of a student and its teacher after the same prompts.

    Attributes:
        prompts: how many.
        max_tokens: limit of a text.
        student, teacher: what each wrote.
        same_tokens: mean number of tokens until the two texts differ.
        same_texts: share of texts that do not differ.
    """

    prompts: int
    max_tokens: int
    student: Writing
    teacher: Writing
    same_tokens: float
    same_texts: float

    def to_dict(self) -> dict:
        """Return plain JSON."""
        return asdict(self)


def compare_generation(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    end: Sequence[int],
    max_tokens: int,
    progress: Advance | None = None,
) -> GenerationComparison:
    """Let both models write greedily and compare.

    Args:
        student, teacher: in evaluation mode.
        prompts: ids, at least one each; one prompt at least.
        end: ids of which each ends a text.
        max_tokens: of a text.
        progress: called after every batch with its number of prompts and "", and as by `sample`.
    """
    greedy = Sampling(temperature=0)
    texts: list[tuple[list[int], list[int]]] = []
    for start in range(0, len(prompts), ROWS):
        batch = prompts[start : start + ROWS]
        written = (sample(model, batch, end, max_tokens, greedy, progress) for model in (student, teacher))
        texts += zip(*written, strict=True)
        if progress is not None:
            progress(len(batch), "")
    same = [_common(*pair) for pair in texts]
    ours, theirs = zip(*texts, strict=True)
    return GenerationComparison(
        prompts=len(texts),
        max_tokens=max_tokens,
        student=writing(ours, max_tokens),
        teacher=writing(theirs, max_tokens),
        same_tokens=sum(same) / len(texts),
        same_texts=sum(a == b for a, b in texts) / len(texts),
    )


def writing(texts: Sequence[Sequence[int]], max_tokens: int) -> Writing:
    """Return what is to be said of texts, as ids, of at most so many tokens."""
    total = repeated = 0
    for text in texts:
        grams = [tuple(text[i : i + NGRAM]) for i in range(len(text) - NGRAM + 1)]
        total, repeated = total + len(grams), repeated + len(grams) - len(set(grams))
    count = len(texts)
    return Writing(
        mean_length=sum(map(len, texts)) / count,
        no_end=sum(len(text) >= max_tokens for text in texts) / count,
        repetition=repeated / total if total else 0.0,
    )


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens are the same until two texts differ."""
    same = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        same += 1
    return same
