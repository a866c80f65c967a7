"""Conversations: the tokenizer's own chat template, and which tokens of the result the assistant wrote."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from ..errors import UserError
from ..support.time_limit import TimeExceeded, time_limit

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_STAND_IN = "@@the-answer@@"
TEMPLATE_SECONDS = 30.0  # for all renderings of a conversation, which take milliseconds: a template may loop for ever


def encode_conversation(
    tokenizer, messages: list[dict], where: str, tools: list[dict] | None = None
) -> tuple[list[int], np.ndarray]:
    """Render and tokenize a conversation.

    The completion is what follows the generation prompt up to and including the end-of-turn marker. Templates with
    {% generation %} tags mark it; for others it is found by rendering again: the conversation before the answer gives
    its start, the conversation with another text in place of the answer gives its end. Tool calls belong to the
    completion, the tools' answers do not.

    Args:
        tokenizer: a fast Hugging Face tokenizer with a chat template.
        messages: [{"role": ..., "content": ...}, ...], those of the assistant with "tool_calls" where it calls tools.
        where: file and line, for error messages.
        tools: descriptions of functions, for the template.

    Returns:
        (ids, completion): token ids, and bool (len(ids),) True = written by the assistant.

    Raises:
        UserError: no template, a template that refuses the conversation, hides where answers are or does not end; no
            answer.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"{where}: a conversation, but the tokenizer {tokenizer.name_or_path!r} has no chat template",
            'use the tokenizer of a chat model, or documents of the form {"text": ...}',
        )
    if not tokenizer.is_fast:
        raise UserError(f"{where}: conversations need a fast tokenizer, not {type(tokenizer).__name__}")
    with bounded(where):
        ids, completion = _encode(tokenizer, messages, where, tools)
    if not completion.any():
        raise UserError(
            f"{where}: a conversation without an answer from the assistant", "remove it, or give it as text"
        )
    return ids, completion


@contextmanager
def bounded(where: str) -> Iterator[None]:
    """Refuse a chat template that does not end, in what is rendered inside.

    Raises:
        UserError: after `TEMPLATE_SECONDS`.
    """
    try:
        with time_limit(TEMPLATE_SECONDS):
            yield
    except TimeExceeded as error:
        raise UserError(
            f"{where}: the chat template does not end within {TEMPLATE_SECONDS:g} seconds",
            "correct the template: one of its loops or macros is too long",
        ) from error


def _encode(tokenizer, messages: list[dict], where: str, tools: list[dict] | None) -> tuple[list[int], np.ndarray]:
    if _GENERATION.search(tokenizer.get_chat_template(tools=tools)):
        encoded = _render(
            tokenizer,
            messages,
            where,
            tools=tools,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, completion = encoded["input_ids"], np.array(encoded["assistant_masks"], dtype=bool)
    else:
        text = _render(tokenizer, messages, where, tools=tools)
        spans = [
            _answer_span(tokenizer, messages, tools, i, text, where)
            for i, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = encoded["input_ids"]
        starts = np.array([start for start, _ in encoded["offset_mapping"]])
        completion = np.zeros(len(ids), dtype=bool)
        for start, end in spans:
            completion |= (start <= starts) & (starts < end)
    return ids, completion


def _answer_span(tokenizer, messages: list[dict], tools, i: int, text: str, where: str) -> tuple[int, int]:
    """Return the span of answer i in `text`, without its generation prompt."""

    def split(replaced: list[dict]) -> tuple[str, str, str]:
        return _render(tokenizer, replaced, where, tools=tools).partition(_STAND_IN)

    stand_in = {"role": "assistant", "content": _STAND_IN}
    if calls := messages[i].get("tool_calls"):  # where the template shows text in addition to calls, keep them
        with_calls = [*messages[:i], stand_in | {"tool_calls": calls}]
        if split(with_calls)[1]:
            stand_in = with_calls[-1]
    replaced = [*messages[:i], stand_in]
    before, alone, closing = split(replaced)
    if i:  # many templates refuse an empty conversation; there the answer begins with its content
        before = _render(tokenizer, messages[:i], where, tools=tools, add_generation_prompt=True)
    _, in_whole, rest = split(replaced + messages[i + 1 :])
    # `rest` is everything after the answer; a template may rewrite earlier turns (Qwen3 drops their thoughts), so
    # only what is the same in both renderings is relied on.
    end = len(text) - len(rest) + len(closing)
    if not (alone and in_whole and text.startswith(before) and text.endswith(rest) and rest.startswith(closing)):
        raise UserError(
            f"{where}: the chat template renders message {i + 1} differently in and out of its conversation",
            "use a template with {% generation %} tags, or single-turn conversations",
        )
    return len(before), end


def _render(tokenizer, messages: list[dict], where: str, *, tokenize: bool = False, **options):
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=tokenize, **options)
    except (TemplateError, ValueError, TypeError, ArithmeticError, LookupError, MemoryError, RecursionError) as error:
        # TypeError and LookupError: a field of another type than it expects
        raise UserError(f"{where}: the chat template refuses the conversation: {error}") from error
