"""What a model finds again in its context, by length and depth: likelihood alone says little of it.

Three tasks, all scored by one forward of the model on the whole text. The likeliest token is right at every token of
an answer exactly when greedy decoding writes that answer.

- passkey: a number in filler text that says nothing, asked for at the end (after Mohtashami and Jaggi, arXiv
  2305.16300).
- needle: a sentence with a number in real documents.
- pairs: lines of a key and a value that are single tokens of the model's vocabulary; then some keys are asked for in
  another order (multi-query associative recall, Arora et al., arXiv 2312.04927). It needs no language and has a known
  chance: a guess among the values that are asked for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError
from ..teacher.sampling import encode
from .controls import CutTeacher, without_recurrence

TASKS = ("passkey", "needle", "pairs")
PAIRS = 16  # keys of a text
BATCH_TOKENS = 8192
WORDS = 1024  # tokens that keys, values and filler are taken from, at most

Source = Callable[[Tensor, int], Tensor]
"""(B, T) ids, count -> (B, count, V) logits at the last `count` positions."""


class Answer(NamedTuple):
    """Tokens that a model is to predict.

    Attributes:
        start: place of the first in the text.
        length: how many.
        depth: where in the text the answer was said, 0 (at its beginning) to 1.
    """

    start: int
    length: int
    depth: float


@dataclass(frozen=True)
class Text:
    """A text with answers at its end.

    Attributes:
        ids: tokens, answers included.
        answers: in the order of their starts.
        choices: ids of which each answer is one; () where answers are free.
    """

    ids: tuple[int, ...]
    answers: tuple[Answer, ...]
    choices: tuple[int, ...] = ()


class PairFrame(NamedTuple):
    """Ids around keys and values.

    Attributes:
        start: before all.
        between: a key and its value.
        end: of a line.
    """

    start: tuple[int, ...] = ()
    between: tuple[int, ...] = ()
    end: tuple[int, ...] = ()

    def line(self, key: int, value: int) -> tuple[int, ...]:
        """Return a pair as it stands in a text."""
        return key, *self.between, value, *self.end


@dataclass(frozen=True)
class RecallScore:
    """Answers of a task at a length and depth.

    Attributes:
        task, length, depth: of the texts, in tokens, and 0 to 1.
        answers: how many.
        exact: share that greedy decoding would write.
        chosen: share where the answer is the likeliest of the text's values; None where answers are free.
    """

    task: str
    length: int
    depth: float
    answers: int
    exact: float
    chosen: float | None


@dataclass(frozen=True)
class RecallPlan:
    """Which texts are made.

    Attributes:
        lengths: of texts, in tokens.
        depths: how many depths, evenly from the beginning to the end.
        samples: texts for each length and depth of passkey and needle, and in all depths together of pairs.
        seed: of all that is drawn.
    """

    lengths: tuple[int, ...]
    depths: int = 5
    samples: int = 8
    seed: int = 0

    def places(self) -> list[float]:
        """Return the depths."""
        return [i / max(1, self.depths - 1) for i in range(self.depths)]


def number_texts(
    tokenizer: PreTrainedTokenizerBase, task: str, plan: RecallPlan, haystack: Sequence[int] | None = None
) -> list[Text]:
    """Return the texts of "passkey" or "needle".

    Args:
        tokenizer: of the models.
        task: the name, which decides the sentences.
        plan: lengths, depths, samples.
        haystack: ids of the filler of "needle", repeated where it is too short; None: sentences that say nothing.

    Raises:
        UserError: a length that has no room for question and answer.
    """
    subject = "pass key" if task == "passkey" else "secret number of the lighthouse"
    begin = encode(tokenizer, f"Remember the {subject}, which this text says once.\n")
    filler = list(haystack or encode(tokenizer, " The path goes up. The path goes down. A bird sings. Time passes."))
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    random_numbers = random.Random(f"{task} {plan.seed}")
    texts = []
    for length in plan.lengths:
        for depth in plan.places():
            for _ in range(plan.samples):
                number = str(random_numbers.randrange(10_000, 100_000))
                needle = encode(tokenizer, f" The {subject} is {number}. Remember it: {number}.")
                question = encode(tokenizer, f"\nWhat is the {subject}? The {subject} is")
                answer = _continuation(tokenizer, f"\nWhat is the {subject}? The {subject} is", f" {number}")
                room = length - len(before) - len(begin) - len(needle) - len(question) - len(answer)
                if room < 0:
                    raise UserError(
                        f"{length} tokens have no room for the {task} task",
                        f"use at least {length - room} with this tokenizer, or the task pairs",
                    )
                offset = random_numbers.randrange(len(filler)) if haystack else 0
                hay = [filler[(offset + i) % len(filler)] for i in range(room)]
                at = round(depth * room)
                ids = [*before, *begin, *hay[:at], *needle, *hay[at:], *question, *answer]
                texts.append(Text(tuple(ids), (Answer(length - len(answer), len(answer), depth),)))
    return texts


def _continuation(tokenizer: PreTrainedTokenizerBase, before: str, after: str) -> list[int]:
    """Return the ids of a text's end, as they are when it is encoded together with what comes before."""
    first, whole = encode(tokenizer, before), encode(tokenizer, before + after)
    return whole[len(first) :] if whole[: len(first)] == first else encode(tokenizer, after)


def pair_texts(words: Sequence[int], frame: PairFrame, plan: RecallPlan) -> list[Text]:
    """Return the texts of "pairs": lines of a key and its value, then the keys that are asked for.

    Args:
        words: ids of which keys and values are taken, see `word_ids`.
        frame: what is around them.
        plan: lengths, depths (into which the places of keys are sorted), samples.

    Raises:
        UserError: a length that has no room for two pairs, or too few words.
    """
    draw = random.Random(f"pairs {plan.seed}")
    line = 2 + len(frame.between) + len(frame.end)
    texts = []
    for length in plan.lengths:
        room = length - len(frame.start)
        count = min(PAIRS, room // (2 * line), len(words) // 3)
        if count < 2:
            least = len(frame.start) + 4 * line
            raise UserError(f"{length} tokens have no room for two pairs", f"use at least {least}, and 6 words")
        for _ in range(plan.samples):
            chosen = draw.sample(list(words), 2 * count)
            keys, values = chosen[:count], chosen[count:]
            others = sorted(set(words) - set(chosen))
            lines, rest = divmod(room - count * line, line)
            asked = {round(i * (lines - 1) / (count - 1)): i for i in range(count)}
            ids = [*frame.start, *draw.choices(others, k=rest)]
            for at in range(lines):
                i = asked.get(at)
                ids += frame.line(*(draw.choices(others, k=2) if i is None else (keys[i], values[i])))
            answers = []
            for i in draw.sample(range(count), count):
                ids += frame.line(keys[i], values[i])
                place = _nearest(i / (count - 1), plan.places())
                answers.append(Answer(len(ids) - 1 - len(frame.end), 1, place))
            texts.append(Text(tuple(ids), tuple(answers), tuple(values)))
    return texts


def _nearest(place: float, places: Sequence[float]) -> float:
    return min(places, key=lambda other: abs(other - place))


def word_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return ids of short words, evenly from the whole vocabulary; all ids but special ones where words are few."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ids = [i for i in range(len(tokenizer)) if i not in special]
    words = [i for i in ids if (text := tokenizer.decode([i]).strip()).isalpha() and text.isascii() and len(text) > 2]
    found = words if len(words) >= 6 * PAIRS else ids
    step = max(1, len(found) // WORDS)
    return found[::step][:WORDS]


def model_source(model: PreTrainedModel) -> Source:
    """Return the logits of a model."""

    def logits(ids: Tensor, count: int) -> Tensor:
        return model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=count).logits

    return logits


@torch.no_grad()
def recall(
    source: Source, task: str, texts: Sequence[Text], progress: Callable[[int], None] | None = None
) -> list[RecallScore]:
    """Return the scores of a model on texts, by length and depth.

    Args:
        source: the model.
        task: name of the texts' task.
        texts: of any lengths.
        progress: called after every batch with its number of texts.
    """
    hits: dict[tuple[int, float], list[tuple[bool, bool]]] = {}
    by_length: dict[int, list[Text]] = {}
    for text in texts:
        by_length.setdefault(len(text.ids), []).append(text)
    for length, group in by_length.items():
        rows = max(1, BATCH_TOKENS // length)
        for start in range(0, len(group), rows):
            batch = group[start : start + rows]
            first = min(text.answers[0].start for text in batch)
            # the logits before the last `length - first` tokens, and so one more of them
            logits = source(torch.tensor([text.ids for text in batch]), length - first + 1).float()
            for text, row in zip(batch, logits, strict=True):
                for answer in text.answers:
                    hits.setdefault((length, answer.depth), []).append(_is_found(text, answer, row, first))
            if progress is not None:
                progress(len(batch))
    free = not texts or not texts[0].choices
    return [
        RecallScore(
            task,
            length,
            depth,
            len(found),
            sum(exact for exact, _ in found) / len(found),
            None if free else sum(chosen for _, chosen in found) / len(found),
        )
        for (length, depth), found in sorted(hits.items())
    ]


def _is_found(text: Text, answer: Answer, logits: Tensor, first: int) -> tuple[bool, bool]:
    """Return whether greedy decoding writes an answer, and whether it is the likeliest of the choices.

    Args:
        text, answer: what is asked.
        logits: (length - first + 1, V), beginning with what is predicted for place `first`.
        first: see there.
    """
    at = answer.start - first
    targets = torch.tensor(text.ids[answer.start : answer.start + answer.length], device=logits.device)
    rows = logits[at : at + answer.length]
    exact = bool((rows.argmax(-1) == targets).all())
    if not text.choices:
        return exact, exact
    likeliest = text.choices[int(rows[0, list(text.choices)].argmax())]
    return exact, likeliest == text.ids[answer.start]


def chance(task: str, texts: Sequence[Text]) -> float:
    """Return what a guess scores: one of the values in "pairs" (`chosen`), one of 90,000 numbers else (`exact`)."""
    return sum(1 / len(text.choices) for text in texts) / len(texts) if task == "pairs" else 1 / 90_000


class RecallReport(NamedTuple):
    """Scores of several models on the same texts.

    Attributes:
        chance: of a guess, by task; see `chance`.
        scores: by model: "student", "teacher", "control" (the teacher cut to the student's windows), "no recurrence"
            (the student, whose recurrences give zero).
    """

    chance: dict[str, float]
    scores: dict[str, list[RecallScore]]

    def to_dict(self) -> dict:
        """Return plain JSON."""
        scores = {model: [asdict(score) for score in found] for model, found in self.scores.items()}
        return {"chance": self.chance, "scores": scores}


def recall_texts(
    tokenizer: PreTrainedTokenizerBase, plan: RecallPlan, haystack: Sequence[int] | None, tasks: Sequence[str] = TASKS
) -> dict[str, list[Text]]:
    """Return the texts by task; "needle" only with documents to hide it in.

    Raises:
        UserError: a length is too short for a task.
    """
    start = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    texts = {}
    for task in tasks:
        if task == "pairs":
            frame = PairFrame(start, tuple(encode(tokenizer, ":")), tuple(encode(tokenizer, "\n")))
            texts[task] = pair_texts(word_ids(tokenizer), frame, plan)
        elif task == "passkey" or haystack:
            texts[task] = number_texts(tokenizer, task, plan, haystack if task == "needle" else None)
    return texts


def recall_of_models(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    texts: Mapping[str, Sequence[Text]],
    progress: Callable[[int], None] | None = None,
) -> RecallReport:
    """Return the scores of a student, its teacher and their controls.

    Args:
        student, teacher: in evaluation mode.
        texts: by task.
        progress: called with numbers of texts, for each of `recall_models`.
    """
    report = RecallReport({task: chance(task, of_task) for task, of_task in texts.items()}, {})
    for name, (source, around) in recall_models(student, teacher).items():
        with around:
            found = [score for task, of_task in texts.items() for score in recall(source, task, of_task, progress)]
        report.scores[name] = found
    return report


def recall_models(
    student: PreTrainedModel, teacher: PreTrainedModel | None
) -> dict[str, tuple[Source, AbstractContextManager]]:
    """Return what is measured, by name, and what it has to be measured within."""
    models: dict[str, tuple[Source, AbstractContextManager]] = {"student": (model_source(student), nullcontext())}
    if teacher is not None:
        models["teacher"] = model_source(teacher), nullcontext()
        if (cut := CutTeacher.of(student, teacher)) is not None:
            models["control"] = cut.last_logits, nullcontext()
    if getattr(student.config, "rwkv_layers", ()):
        models["no recurrence"] = model_source(student), without_recurrence(student)
    return models
