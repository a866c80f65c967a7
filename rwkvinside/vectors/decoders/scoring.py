"""Decoded predictions beside the true next sentences: examples, and how well they agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch.nn.functional as F

from ..data import Split, Windows
from ..embedders import Embedder
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


def decoding_score(
    predictor: Predictor, windows: Windows, decoder: Decoder, encoder: Embedder | None = None
) -> dict[str, float]:
    """Return how well decoded predictions agree with the true next sentences.

    Args:
        predictor: that predicts.
        windows: their contexts and targets.
        decoder: of their space.
        encoder: embeds what was decoded, if it is there.

    Returns:
        see `agreement`. nearer: with an encoder, part of the texts that differ whose vectors are nearer to the
        prediction than that of the true sentence, so that no search for the nearest text would find it.
    """
    texts, predicted = windows.data.texts or [], predict(predictor, windows)
    decoded, true = decoder.decode(predicted), [texts[at] for at in windows.targets.tolist()]
    numbers = agreement(decoded, true)
    differ = [i for i in range(len(true)) if not _same(decoded[i], true[i])]
    if encoder is not None and differ:
        ours = F.cosine_similarity(encoder.quietly([decoded[i] for i in differ]), predicted[differ], dim=-1)
        theirs = F.cosine_similarity(windows.data.vectors[windows.targets[differ]], predicted[differ], dim=-1)
        numbers["nearer"] = float((ours > theirs).float().mean())
    return numbers


def agreement(decoded: Sequence[str], true: Sequence[str]) -> dict[str, float]:
    """Return how well texts agree.

    Returns:
        decode: part that is the same but for white space and case. words: F1 of the words, each counted as often as it
        stands in both (as in SQuAD, Rajpurkar et al. 2016), averaged over the texts.
    """
    same, overlap = 0, 0.0
    for ours, theirs in zip(decoded, true, strict=True):
        same += _same(ours, theirs)
        a, b = ours.lower().split(), theirs.lower().split()
        common = (Counter(a) & Counter(b)).total()
        overlap += 2 * common / (len(a) + len(b)) if common else 0.0
    count = max(len(true), 1)
    return {"decode": same / count, "words": overlap / count}


def _same(ours: str, theirs: str) -> bool:
    return ours.lower().split() == theirs.lower().split()
