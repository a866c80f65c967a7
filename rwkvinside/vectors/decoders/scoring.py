"""Decoded predictions beside the true next sentences: examples, and how well they agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from ..data import Split, Windows
from ..metrics import Predictor, predict
from .base import Decoder


def decoded_examples(predictors: Mapping[str, Predictor], both: Split, decoder: Decoder, count: int) -> list[dict]:
    """Return contexts, true next sentences and what is predicted, as texts.

    Args:
        predictors: by name.
        both: windows to take examples from, those of validation.
        decoder: of their space.
        count: of examples, evenly spaced.
    """
    some, texts = both.val.evenly(count), both.val.data.texts or []
    decoded = {name: decoder.decode(predict(predictor, some)) for name, predictor in predictors.items()}
    return [
        {
            "context": texts[start : start + some.context],
            "target": texts[start + some.context],
            "decoded": {name: lines[i] for name, lines in decoded.items()},
        }
        for i, start in enumerate(some.starts.tolist())
    ]


def decoding_score(predictor: Predictor, windows: Windows, decoder: Decoder) -> dict[str, float]:
    """Return how well decoded predictions agree with the true next sentences, see `agreement`."""
    texts = windows.data.texts or []
    return agreement(decoder.decode(predict(predictor, windows)), [texts[at] for at in windows.targets.tolist()])


def agreement(decoded: Sequence[str], true: Sequence[str]) -> dict[str, float]:
    """Return how well texts agree.

    Returns:
        decode: part that is the same but for white space and case. words: F1 of the words, each counted as often as it
        stands in both (as in SQuAD, Rajpurkar et al. 2016), averaged over the texts.
    """
    same, overlap = 0, 0.0
    for ours, theirs in zip(decoded, true, strict=True):
        a, b = ours.lower().split(), theirs.lower().split()
        same += a == b
        common = (Counter(a) & Counter(b)).total()
        overlap += 2 * common / (len(a) + len(b)) if common else 0.0
    count = max(len(true), 1)
    return {"decode": same / count, "words": overlap / count}
