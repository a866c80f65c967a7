"""What a model writes after many prompts, in batches."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError
from ..support.progress import Progress
from ..teacher.sampling import Sampling, encode, end_tokens, render_chat, sample


@dataclass(frozen=True)
class Text:
    """What was written after a prompt.

    Attributes:
        tokens: that were generated, without the one that ended it.
        ended: the model ended it, not the limit.
    """

    prompt: str
    text: str
    tokens: int
    ended: bool


@dataclass(frozen=True)
class Texts:
    """What was written after all prompts.

    Attributes:
        plain: prompts were continued; else they were a user's turns, answered.
        seconds: of all batches, reading included.
    """

    texts: list[Text]
    plain: bool
    system: str
    sampling: Sampling
    seconds: float

    @property
    def tokens(self) -> int:
        """Tokens that were generated."""
        return sum(each.tokens for each in self.texts)

    @property
    def tokens_per_second(self) -> float:
        """Of all rows together."""
        return self.tokens / self.seconds

    def to_dict(self) -> dict:
        """Return plain JSON."""
        return asdict(self) | {"tokens": self.tokens, "tokens_per_second": self.tokens_per_second}


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    plain: bool = False,
    system: str = "",
    notes: Console | None = None,
) -> Texts:
    """Write after each prompt.

    Args:
        model: in evaluation mode.
        tokenizer: its own.
        prompts: beginnings of texts, or users' turns.
        sampling: how; batch i draws from seed + i.
        plain: continue, even if there is a chat template; without one prompts are always continued.
        system: system prompt; in plain mode it stands before every prompt.
        notes: console for progress; None is silent.

    Raises:
        UserError: a prompt without tokens, or that the template refuses.
    """
    plain = plain or not tokenizer.chat_template
    starts = [_start(tokenizer, prompt, plain, system) for prompt in prompts]
    end, found, started = end_tokens(tokenizer, model), [], time.perf_counter()
    with Progress("generating", len(prompts), unit="prompts", stream=notes.file if notes else None) as progress:
        for number, first in enumerate(range(0, len(prompts), sampling.rows)):
            torch.manual_seed(sampling.seed + number)
            batch = slice(first, first + sampling.rows)
            advance = None if notes is None else progress.advance
            written = sample(model, starts[batch], end, sampling.max_tokens, sampling, advance)
            for prompt, start, ids in zip(prompts[batch], starts[batch], written, strict=True):
                found.append(Text(prompt, _text(tokenizer, start, ids), len(ids), len(ids) < sampling.max_tokens))
            if notes is not None:
                progress.advance(len(prompts[batch]))
    return Texts(found, plain, system, sampling, time.perf_counter() - started)


def _start(tokenizer: PreTrainedTokenizerBase, prompt: str, plain: bool, system: str) -> list[int]:
    if plain:
        ids = tokenizer(system + prompt)["input_ids"]
        while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # it is to go on
            ids = ids[:-1]
    else:
        turns = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": prompt}]
        ids = encode(tokenizer, render_chat(tokenizer, turns, add_generation_prompt=True))
    if not ids:
        raise UserError(f"the tokenizer makes no token of the prompt {prompt!r}", "give another one")
    return ids


def _text(tokenizer: PreTrainedTokenizerBase, start: list[int], ids: list[int]) -> str:
    """Return ids as text that follows `start`: by themselves, some tokenizers drop the space that they begin with."""
    before = tokenizer.decode(start, skip_special_tokens=True)
    return tokenizer.decode(start + ids, skip_special_tokens=True)[len(before) :]
