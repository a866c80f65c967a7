"""Changes of a word in a text, and the words that there are to choose from."""

from __future__ import annotations

import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

WORD = re.compile(r"\w+")
COMMON = 8  # words that are tried in every gap

Span = tuple[int, int]


@dataclass(frozen=True)
class Lexicon:
    """Words to write with.

    Attributes:
        words: as they are spelled within a sentence.
        vectors: (W, d) of each word alone, of unit length.
        common: those that the texts have most often.
    """

    words: tuple[str, ...]
    vectors: Tensor
    common: tuple[str, ...]


def build_lexicon(texts: Sequence[str], vocabulary: Sequence[str], encode: Callable[[list[str]], Tensor]) -> Lexicon:
    """Return the words of texts and those of an embedder's vocabulary.

    Args:
        texts: any.
        vocabulary: words of an embedder's tokenizer.
        encode: from texts to vectors.
    """
    spellings: dict[str, Counter[str]] = defaultdict(Counter)
    for text in texts:
        for word in WORD.findall(text):
            spellings[word.lower()][word] += 1
    for word in vocabulary:
        if word.lower() not in spellings:
            spellings[word.lower()][word] = 0
    # a word that is ever written small begins sentences with a capital; one that never is has it everywhere
    words = [lower if lower in found else max(found, key=lambda w: found[w]) for lower, found in spellings.items()]
    frequent = sorted(range(len(words)), key=lambda i: -spellings[words[i].lower()].total())[:COMMON]
    return Lexicon(tuple(words), F.normalize(encode(words), dim=-1), tuple(words[i] for i in frequent))


def spans(text: str) -> list[Span]:
    """Return where the words of a text begin and end."""
    return [match.span() for match in WORD.finditer(text)]


def replaced(text: str, span: Span, word: str) -> str:
    """Return a text with another word in a place; a capital stays one."""
    start, end = span
    return text[:start] + (_capital(word) if text[start].isupper() else word) + text[end:]


def removed(text: str, span: Span) -> str:
    """Return a text without a word; an apostrophe before it goes, too, and a capital moves on."""
    start, end = span
    before, after = text[:start].removesuffix("'").rstrip(), text[end:]
    if not before:
        return _capital(after.lstrip()) if text[start].isupper() else after.lstrip()
    return before + after


def inserted(text: str, place: int, word: str) -> str:
    """Return a text with one word more, before the word of a place, or after the last one."""
    places = spans(text)
    if place == len(places):
        end = places[-1][1] if places else 0
        return f"{text[:end]} {word}{text[end:]}".lstrip()
    start = places[place][0]
    return text[:start] + (_capital(word) if not place and text[start].isupper() else word) + " " + text[start:]


def rearranged(text: str, common: Sequence[str]) -> list[str]:
    """Return texts with a word in another place, a common word more, or a letter more or less at the end of a word."""
    places = spans(text)
    found = [inserted(text, place, word) for word in common for place in range(len(places) + 1)]
    for start, end in places:
        rest = removed(text, (start, end))
        found += [inserted(rest, place, text[start:end]) for place in range(len(spans(rest)) + 1)]
        found += [text[:end] + letter + text[end:] for letter in string.ascii_lowercase]
        found += [text[: end - 1] + text[end:]] if end - start > 1 else []
    return found


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
