"""A teacher writes: sampling from it in batches, and what its tokenizer says of texts and conversations.

Knows no files; `conversion/generate.py` writes what comes out of here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from ..data.chat import TemplateRefusal, render
from ..errors import UserError

STAND_IN = "@@the-user's-turn@@"
Advance = Callable[[int, str], None]  # `support.progress.Progress.advance`


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: only the likeliest tokens that together have this probability.
        max_tokens: of one text or answer.
        rows: texts that are written at a time.
        seed: with it and the number of a batch, all of the batch's tokens are determined.

    Raises:
        UserError: a value out of its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 512
    rows: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature {self.temperature:g}", "allowed: 0 (the likeliest token) and more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p:g}", "allowed: above 0, up to 1 (all tokens)")
        for name in ("max_tokens", "rows"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"{name} {value}", "at least 1")


@dataclass(frozen=True)
class UserTurn:
    """How a chat template surrounds what a user says, when that begins a conversation.

    Attributes:
        before: ids up to where the user's words begin, with the system prompt that the template brings.
        end: ids of which each ends a turn.
    """

    before: list[int]
    end: list[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> UserTurn:
        """Return it for a tokenizer's template.

        Raises:
            UserError: the template refuses a conversation of one turn, changes its words, or ends it with plain text.
        """
        text = render_chat(tokenizer, [{"role": "user", "content": STAND_IN}], add_generation_prompt=False)
        before, found, after = text.partition(STAND_IN)
        if not found:
            raise UserError("the chat template changes what a user says", "use --plain")
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        closing = [i for i in encode(tokenizer, after) if i in special][:1]
        if not closing:
            raise UserError("the chat template ends a user's turn with no token of its own", "use --plain")
        return cls(encode(tokenizer, before), sorted({*closing, *end_tokens(tokenizer, model)}))


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict], *, add_generation_prompt: bool) -> str:
    """Return a conversation as text, by the tokenizer's template.

    Raises:
        UserError: the template refuses it.
    """
    try:
        return render(tokenizer, messages, add_generation_prompt=add_generation_prompt).text
    except TemplateRefusal as refusal:
        raise UserError(f"the chat template refuses a conversation: {refusal}", "use --plain") from refusal


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a text, without any that the tokenizer would put around it."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def end_tokens(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[int]:
    """Return the ids that end a text: the tokenizer's and the model's end-of-text tokens."""
    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in (*listed, tokenizer.eos_token_id) if i is not None})


def text_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what a text begins with: the first of the ids that the tokenizer frames texts with, bos or eos.

    Raises:
        UserError: it has neither.
    """
    for start in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if start is not None:
            return [start]
    raise UserError("the tokenizer has no token that a text begins with", "give beginnings of texts with --prompts")


class _Said(StoppingCriteria):
    """Says at every token how many a batch has, and stops nothing: a batch may take minutes."""

    def __init__(self, advance: Advance, before: int, most: int):
        self.advance, self.before, self.most = advance, before, most

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        self.advance(0, f"token {input_ids.shape[1] - self.before:,} of {self.most:,}")
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    end: Sequence[int],
    max_tokens: int,
    sampling: Sampling,
    advance: Advance | None = None,
) -> list[list[int]]:
    """Return what the model writes after each prompt, without the token that ends it.

    Tokens are drawn from torch's global generator.

    Args:
        model: in evaluation mode.
        prompts: ids, at least one each; padded on the left to the longest.
        end: ids of which each ends a text; may be empty.
        max_tokens: of each text.
        sampling: how to draw.
        advance: of a progress, which is told of every token and advanced by none.
    """
    width = max(map(len, prompts))
    pad = end[0] if end else 0
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    real = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    drawn = dict(do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=0)
    how = GenerationConfig(
        max_new_tokens=max_tokens,
        eos_token_id=list(end) or None,
        pad_token_id=pad,
        **(drawn if sampling.temperature else dict(do_sample=False)),
    )
    said = None if advance is None else [_Said(advance, width, max_tokens)]
    out = model.generate(input_ids=ids, attention_mask=real, generation_config=how, stopping_criteria=said)
    written = out[:, width:].tolist()
    return [_until(row, set(end)) for row in written]


def _until(ids: list[int], end: set[int]) -> list[int]:
    return ids[: next((at for at, each in enumerate(ids) if each in end), len(ids))]
