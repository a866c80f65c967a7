"""What a model says: an answer to a question, and how it goes on from a beginning."""

from __future__ import annotations

from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..teacher.sampling import Sampling, encode, end_tokens, render_chat, sample


@dataclass(frozen=True)
class Prompts:
    """What models are to say something about.

    Attributes:
        question: a user's turn; None, or a tokenizer without a chat template: no answer.
        beginning: of a text; None: no continuation.
        tokens: of an answer or a continuation, at most.
    """

    question: str | None
    beginning: str | None
    tokens: int


@dataclass(frozen=True)
class Samples:
    """What models say.

    Attributes:
        prompts: about what.
        said: by model, what `say` returned.
    """

    prompts: Prompts
    said: dict[str, dict[str, str]]

    def to_dict(self) -> dict:
        """Return plain JSON: texts by model."""
        return self.said


def say(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Prompts) -> dict[str, str]:
    """Return the likeliest tokens after each prompt, as text, by "answer" and "continuation".

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        prompts: what to say something about.
    """
    ids: dict[str, list[int]] = {}
    if prompts.question is not None and tokenizer.chat_template:
        chat = render_chat(tokenizer, [{"role": "user", "content": prompts.question}], add_generation_prompt=True)
        ids["answer"] = encode(tokenizer, chat)
    if prompts.beginning is not None:
        ids["continuation"] = tokenizer(prompts.beginning)["input_ids"]
    end, likeliest = end_tokens(tokenizer, model), Sampling(temperature=0)
    written = {kind: sample(model, [prompt], end, prompts.tokens, likeliest)[0] for kind, prompt in ids.items()}
    return {kind: tokenizer.decode(out, skip_special_tokens=True).strip() for kind, out in written.items()}


def show_samples(samples: Samples, console: Console) -> None:
    """Print under each prompt what each model says."""
    for kind, given in (("answer", samples.prompts.question), ("continuation", samples.prompts.beginning)):
        rows = {name: each[kind] for name, each in samples.said.items() if kind in each}
        if not rows:
            continue
        console.print(f"\n{given}", style="italic", markup=False, soft_wrap=True)
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("model", no_wrap=True)
        table.add_column(kind, overflow="fold")
        for name, text in rows.items():
            table.add_row(name, escape(text))
        console.print(table)
