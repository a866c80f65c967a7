"""How much attention matters in each layer, measured on an all-RWKV student next to its teacher.

    error     relative error of the layer's mixer on the teacher's own stream: free, one forward over the text
    restore   KL of the student less KL of the student with this layer's attention put back: KL-guided layer selection
              (arXiv 2512.20569); with `distill`, of students whose mixers were trained for a moment before
    swap      what the teacher loses in recall, relative to what it loses in likelihood, when this layer's mixer runs in
              place of its attention: the importance of HALO (arXiv 2601.22156)
    greedy    as restore, one layer after the other, each next to those that have their attention back already

Nothing is rebuilt: the modes of single layers make all these models of one. Whoever calls sets the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol

import torch

from ..data.batch import Batch
from ..hybrid.layouts import LayerChoice
from ..hybrid.model import HybridModel
from ..losses.distillation import DistillationLoss
from ..losses.next_token import NextTokenLoss
from ..support.text import short_count
from ..teacher.signals import SelfTeacher
from .select import best_layers, greedy_layers

Advance = Callable[[], object]  # called after every forward over a batch

FLOOR = 0.1  # of the mean loss of likelihood: a layer that costs nothing is not important for that
STABLE = 3  # rounds in succession that choose the same layers: there is no need for longer distillations


@dataclass(frozen=True)
class Scores:
    """Scores of all layers by one method.

    Attributes:
        method: see the head of this file; `LayerChoice.method`.
        layers: score of each layer, in order; the larger, the more its attention is worth.
        tokens: of the text that were measured.
        base: KL of the all-RWKV student, of restore and greedy.
        details: what the scores were made of, one value a layer by name.
        order: of greedy, the layers as they were chosen.
        choice: what was to be fulfilled, of greedy and of a restore that distills: it decided how much was measured.
        warning: why they say little; "": nothing speaks against them.
    """

    method: str
    layers: list[float]
    tokens: int
    base: float | None = None
    details: dict[str, list[float]] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    choice: dict | None = None
    warning: str = ""

    def serves(self, choice: LayerChoice) -> bool:
        """Return whether these scores decide a choice."""
        return self.method == choice.method and self.choice in (None, asdict(choice))

    def select(self, choice: LayerChoice) -> tuple[int, ...]:
        """Return the layers that keep attention, ascending."""
        if self.order:
            return tuple(sorted(self.order))
        layers = best_layers(self.layers, choice)
        if layers is None:
            raise RuntimeError(f"{choice} cannot be fulfilled")
        return layers


Kept = tuple[int, ...]  # layers that have their attention back


class Trials(Protocol):
    """Short distillations of the students that keep the attention of some layers."""

    def __call__(self, candidates: Sequence[Kept], tokens: int, score: Callable[[Kept], float]) -> list[float]:
        """Return a score of each candidate, whose mixers were trained on so many tokens; leave the model as it was.

        Args:
            candidates: students by the layers that they keep; several processes share them.
            tokens: one of `LayerChoice.rounds`, or 0.
            score: called while the model has the candidate's mixers, unless its result is known.
        """


@torch.no_grad()
def measure(
    model: HybridModel,
    batches: Sequence[Batch],
    choice: LayerChoice,
    recall: Callable[[], Batch],
    advance: Advance,
    trials: Trials | None = None,
) -> Scores:
    """Return the scores that a choice needs.

    Args:
        model: all layers RWKV, with the teacher's attention; nothing but mixers was trained.
        batches: of held-out text, on the model's device.
        choice: names the method; restore stops once more text does not change what it chooses.
        recall: makes rows whose labels are what has to be recalled, for swap.
        advance: called `forwards` times at most.
        trials: for a restore that distills.
    """
    if choice.distill is not None:
        if trials is None:
            raise TypeError(f"{choice} needs trials")
        return _restore_distilled(model, batches, choice, trials, advance)
    measures: dict[str, Callable[[], Scores]] = {
        "error": lambda: _error(model, batches, advance),
        "restore": lambda: _restore(model, batches, choice, advance),
        "swap": lambda: _swap(model, batches, recall(), advance),
        "greedy": lambda: _greedy(model, batches, choice, advance),
    }
    return measures[choice.choose]()


def forwards(choice: LayerChoice, layers: int, batches: int) -> int:
    """Return how often `measure` calls `advance` at most."""
    if choice.distill is not None:
        return (1 + len(choice.rounds)) * (1 + layers) * batches
    greedy = 2 + sum(layers - done for done in range(choice.keep))  # the teacher, and the student without attention
    students = {"error": 1, "restore": layers, "swap": layers, "greedy": greedy}
    return students[choice.choose] * batches


def _error(model: HybridModel, batches: Sequence[Batch], advance: Advance) -> Scores:
    errors = torch.zeros(2, len(model.rwkv_layers), dtype=torch.float64)
    for batch in batches:
        found = model(batch, "align")
        errors += torch.tensor([[float(found[i][part]) for i in model.rwkv_layers] for part in (0, 1)])
        advance()
    return Scores("error", (errors[0] / errors[1]).tolist(), _tokens(batches))


def _restore(model: HybridModel, batches: Sequence[Batch], choice: LayerChoice, advance: Advance) -> Scores:
    layers = model.rwkv_layers
    base, kl, tokens = 0.0, [0.0] * len(layers), 0
    before: tuple[int, ...] | None = None
    for number, batch in enumerate(batches, start=1):
        signal = SelfTeacher().signal(model, batch)
        base += _divergence(model, batch, signal, ())
        for at, i in enumerate(layers):
            kl[at] += _divergence(model, batch, signal, (i,))
            advance()
        tokens += batch.num_targets
        if number & (number - 1) == 0:  # the text has doubled
            chosen = best_layers([-value for value in kl], choice)
            if chosen == before:
                break
            before = chosen
    kl = [value / tokens for value in kl]
    return Scores("restore", [base / tokens - value for value in kl], tokens, base / tokens, {"kl": kl})


def _restore_distilled(
    model: HybridModel, batches: Sequence[Batch], choice: LayerChoice, trials: Trials, advance: Advance
) -> Scores:
    tokens, candidates = _tokens(batches), [(), *((i,) for i in model.rwkv_layers)]

    def divergence(kept: Kept) -> float:
        total = 0.0
        for batch in batches:
            total += _divergence(model, batch, SelfTeacher().signal(model, batch), kept)
            advance()
        return total / tokens

    details: dict[str, list[float]] = {}
    base, kl, chosen = 0.0, [], []
    for length in (0, *choice.rounds):
        base, *kl = trials(candidates, length, divergence)
        details[f"kl@{short_count(length)}"] = kl
        chosen.append(best_layers([-value for value in kl], choice))
        if len(chosen) >= STABLE and len(set(chosen[-STABLE:])) == 1:
            break
    scores = [base - value for value in kl]
    return Scores(choice.method, scores, tokens, base, details, choice=asdict(choice))


def _swap(model: HybridModel, batches: Sequence[Batch], recall: Batch, advance: Advance) -> Scores:
    recall = recall.to(batches[0].input_ids.device)

    def likelihood(batches: Sequence[Batch], modes: Mapping[int, str], advance: Advance = lambda: None) -> float:
        loss = 0.0
        for batch in batches:
            loss += float(model(batch, "teacher", NextTokenLoss(), layers=modes)[0])
            advance()
        return -loss / sum(batch.num_targets for batch in batches)

    recalled, likely = [], []
    for i in model.rwkv_layers:
        recalled.append(likelihood([recall], {i: "student"}))
        likely.append(likelihood(batches, {i: "student"}, advance))
    of_recall, of_text = ([max(values) - value for value in values] for values in (recalled, likely))
    floor = FLOOR * sum(of_text) / len(of_text)
    scores = [lost / (cost + floor) if lost else 0.0 for lost, cost in zip(of_recall, of_text, strict=True)]
    own, guess = likelihood([recall], {}), -math.log(recall.num_targets / len(recall.rows))
    warning = f"the teacher itself recalls {own:.3g} nats a value; a guess among those of a text is {guess:.3g}"
    details = {"recall": recalled, "likelihood": likely}
    return Scores("swap", scores, _tokens(batches), None, details, warning=warning if own < guess else "")


def _greedy(model: HybridModel, batches: Sequence[Batch], choice: LayerChoice, advance: Advance) -> Scores:
    tokens = _tokens(batches)
    signals = []
    for batch in batches:
        signals.append(SelfTeacher().signal(model, batch))
        advance()
    measured: dict[tuple[int, ...], float] = {}

    def gain(kept: tuple[int, ...]) -> float:
        if kept not in measured:
            total = 0.0
            for batch, signal in zip(batches, signals, strict=True):
                total += _divergence(model, batch, signal, kept)
                advance()
            measured[kept] = total / tokens
        return -measured[kept]

    count = len(model.rwkv_layers)
    order = greedy_layers(gain, count, choice)
    base, scores, kl = -gain(()), [], []
    for i in range(count):  # a layer next to those that were chosen before it
        earlier = order[: order.index(i)] if i in order else order[:-1]
        with_it = tuple(sorted([*earlier, i]))
        kl.append(-gain(with_it))
        scores.append(-gain(tuple(sorted(earlier))) - kl[-1])
    return Scores("greedy", scores, tokens, base, {"kl": kl}, order, asdict(choice))


def _divergence(model: HybridModel, batch: Batch, signal: object, kept: Sequence[int]) -> float:
    """Return the sum of KL over a batch, of the student that keeps the attention of some layers."""
    return float(model(batch, "student", DistillationLoss(signal), layers=dict.fromkeys(kept, "kept"))[0])


def _tokens(batches: Sequence[Batch]) -> int:
    return sum(batch.num_targets for batch in batches)
