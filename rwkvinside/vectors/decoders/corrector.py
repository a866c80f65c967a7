"""What an inverter writes, corrected word by word until nothing brings its vector closer to the one that is decoded.

The idea is vec2text's (Morris et al. 2023, arXiv 2310.06816): embed what was written, compare, and write again. There a
second model writes again. Here single changes are embedded and the best one is made: a word replaced, added, removed or
moved, a letter at its end. Which words are worth it in a place, the vectors say: that of the text without the word and
that of each word alone, added, are compared with the vector that is decoded. So names that no inverter has read are
found, if need be letter by letter.

The text of a vector is met: its cosine is 1. A prediction lies beside the vectors of texts, and what comes nearest to
it is no sentence. So changes count only where they end close to the vector, and else the best of the inverter's own
hypotheses does, by cosine and by its likelihood.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...support.progress import Progress
from ..data import VectorData, evenly
from ..embedders import Embedder, embedder_of
from ..fitting import CONFIG
from ..settings import InverterConfig, load_config
from ..store import read_store
from .edits import Lexicon, build_lexicon, inserted, rearranged, removed, replaced, spans
from .inverter import TrainedInverter, held_out, load_inverter
from .scoring import agreement

HYPOTHESES = 8  # that the inverter writes for a vector
LIKELIHOOD = 0.02  # weight of the logarithm of a hypothesis' likelihood beside its cosine
ROUNDS = 10  # of changes
REPLACEMENTS, ADDITIONS = 32, 4  # that are embedded for a text in a round; the latter in every gap
SHARE = 0.5  # of a word's own vector in that of a text, for the estimate
STEP = 0.02  # part of what is missing to a cosine of 1 that a change must bring
EARLY = 2  # rounds after which only vectors go on whose text is close: others are hardly those of a text
MET, CLOSE, SAME = 0.95, 0.9, 0.9995  # cosines: the text is found; it is worth looking further; nothing is left to do
ROWS = 32


@dataclass(frozen=True)
class Corrector:
    """A decoder: an inverter whose texts are corrected.

    Attributes:
        inverter: writes.
        encoder: embeds what was written, in the space of the vectors.
        lexicon: words to correct with.
    """

    inverter: TrainedInverter
    encoder: Embedder
    lexicon: Lexicon

    def decode(self, vectors: Tensor) -> list[str]:
        """Return a text for each of the vectors (N, d); many show progress."""
        texts: list[str] = []
        with Progress("corrector", len(vectors), unit="vectors") as progress:
            for part in vectors.split(ROWS):
                texts += self._decode(F.normalize(part.float().cpu(), dim=-1))
                progress.advance(len(part))
        return texts

    def _decode(self, goals: Tensor) -> list[str]:
        search = _Search(goals, self.encoder.quietly)
        first = self._likeliest(search)
        search.take(enumerate(first))
        active = list(range(len(goals)))
        for done in range(ROUNDS):
            active = [i for i in active if (done < EARLY or search.near[i] >= CLOSE) and search.near[i] < SAME]
            search.encode([rest for i in active for rest in _shorter(search.texts[i])])  # all at once; `_changes` asks
            moved = search.take([(i, text) for i in active for text in self._changes(search, i)])
            stuck = [i for i in active if i not in moved and search.near[i] >= CLOSE]
            active = sorted(
                moved
                | search.take([(i, text) for i in stuck for text in rearranged(search.texts[i], self.lexicon.common)])
            )
        return [search.texts[i] if search.near[i] >= MET else text for i, text in enumerate(first)]

    def _likeliest(self, search: _Search) -> list[str]:
        """Return the best of the inverter's hypotheses for each vector."""
        hypotheses, likelihood = self.inverter.hypotheses(search.goals, HYPOTHESES)
        vectors = search.encode([text for texts in hypotheses for text in texts]).unflatten(0, (-1, HYPOTHESES))
        near = (vectors * search.goals[:, None]).sum(-1)
        best = (near + LIKELIHOOD * likelihood).argmax(1).tolist()
        return [texts[at] for texts, at in zip(hypotheses, best, strict=True)]

    def _changes(self, search: _Search, i: int) -> list[str]:
        """Return texts that differ from the one of a vector by a word."""
        text, goal, words = search.texts[i], search.goals[i], self.lexicon.words
        places = spans(text)
        shorter = _shorter(text)
        # the vector of a text with a word more, as if it were the sum of theirs
        rest = torch.cat([search.encode(shorter), search.vectors[i : i + 1]])
        length = (1 + SHARE**2 + 2 * SHARE * rest @ self.lexicon.vectors.T).clamp(min=1e-6).sqrt()
        estimate = ((rest @ goal)[:, None] + SHARE * (self.lexicon.vectors @ goal)) / length
        best = estimate[:-1].flatten()
        best = best.topk(min(REPLACEMENTS, len(best))).indices.tolist()
        more = estimate[-1].topk(min(ADDITIONS, len(words))).indices.tolist()
        return [
            *filter(None, shorter),
            *(replaced(text, places[at // len(words)], words[at % len(words)]) for at in best),
            *(inserted(text, place, words[at]) for at in more for place in range(len(places) + 1)),
        ]


def _shorter(text: str) -> list[str]:
    """Return a text without each of its words in turn."""
    return [removed(text, span) for span in spans(text)]


class _Search:
    """The nearest texts so far.

    Attributes:
        goals: (N, d) what is decoded, of unit length.
        texts: N, vectors (N, d) of unit length, near (N,) cosines with the goals.
    """

    def __init__(self, goals: Tensor, encode: Callable[[Sequence[str]], Tensor]):
        self.goals, self._encode = goals, encode
        self.texts, self.vectors = [""] * len(goals), torch.zeros_like(goals)
        self.near = torch.full((len(goals),), -1.0)
        self._known: dict[str, Tensor] = {}

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return the vectors of texts, of unit length; none is embedded twice."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known.update(zip(new, F.normalize(self._encode(new), dim=-1), strict=True))
        return torch.stack([self._known[text] for text in texts]) if texts else self.goals[:0]

    def take(self, proposals: Iterable[tuple[int, str]]) -> set[int]:
        """Take the texts that are nearer than what there is, and return the numbers of their vectors."""
        proposals = list(proposals)
        vectors = self.encode([text for _, text in proposals])
        near = (vectors * self.goals[[i for i, _ in proposals]]).sum(-1).tolist()
        moved = set()
        for (i, text), vector, cosine in zip(proposals, vectors, near, strict=True):
            if cosine > self.near[i] + STEP * (1 - self.near[i]):
                self.texts[i], self.vectors[i], self.near[i] = text, vector, cosine
                moved.add(i)
        return moved


def load_corrector(folder: Path, data: VectorData, texts: Sequence[str] | None = None) -> Corrector:
    """Return the corrector of a trained inverter.

    Args:
        folder: of the inverter.
        data: whose space is decoded.
        texts: whose words it may write, besides those of the embedder's vocabulary; None: all of the data.

    Raises:
        UserError: see `load_inverter` and `embedder_of`.
    """
    inverter = load_inverter(folder, str(data.card.get("space")))
    encoder = embedder_of(data.card, "use --decoder inverter:DIR, which embeds nothing, or retrieval")
    known = (data.texts or []) if texts is None else texts
    return Corrector(inverter, encoder, build_lexicon(known, encoder.vocabulary, encoder.encode))


def correction_score(folder: Path, count: int) -> dict[str, dict[str, float]]:
    """Return how well texts are written from their vectors: as the inverter writes them, and corrected.

    Words of held-out texts come from the embedder's vocabulary alone, unless the inverter has read them elsewhere.

    Args:
        folder: of a trained inverter.
        count: texts of each kind.

    Returns:
        numbers of `agreement` by "train" and "held_out" (where there are such), with `_corrected` for corrected ones,
        which also have the cosine reached and the `seconds` of a text.

    Raises:
        UserError: see `load_corrector`.
    """
    config = load_config(InverterConfig, [folder / CONFIG])
    data = read_store(config.source)
    texts, held = data.texts or [], held_out(data, config)
    decoder = load_corrector(folder, data, [texts[i] for i in (~held).nonzero().flatten().tolist()])
    numbers = {}
    for kind, rows in (("train", (~held).nonzero().flatten()), ("held_out", held.nonzero().flatten())):
        if not len(rows):
            continue
        rows = rows[evenly(len(rows), count)]
        true = [texts[i] for i in rows.tolist()]
        numbers[kind] = agreement(decoder.inverter.decode(data.vectors[rows]), true)
        start = time.perf_counter()
        written = decoder.decode(data.vectors[rows])
        seconds = (time.perf_counter() - start) / len(rows)
        near = F.cosine_similarity(decoder.encoder.quietly(written), data.vectors[rows], dim=-1)
        numbers[f"{kind}_corrected"] = agreement(written, true) | {"cosine": float(near.mean()), "seconds": seconds}
    return numbers
