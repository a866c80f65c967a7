"""Conversations: the tokenizer's own chat template, and which tokens of the result the assistant wrote."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..support.bounded_process import OutOfBounds, bounded_process
from .defaults import DATE

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_STAND_IN = "@@the-answer@@"
# For a rendering, which takes milliseconds and kilobytes: a template is a program, and may do whatever it likes.
TEMPLATE_SECONDS, TEMPLATE_BYTES = 10.0, 2**30

DATE_CODES = (*(f"%{letter}" for letter in "aAbBcdDeFGgHhIjmMpRSTuUVwWxXyY"), *(f"%-{letter}" for letter in "dmHIjMS"))


def asks_for_date(tokenizer) -> bool:
    """Return whether what a chat template writes depends on the day."""
    return "strftime_now" in str(tokenizer.chat_template)


def encode_conversation(
    tokenizer, messages: list[dict], where: str, tools: list[dict] | None = None, today: str = DATE
) -> tuple[list[int], np.ndarray]:
    """Render and tokenize a conversation.

    The completion is what follows the generation prompt up to and including the end-of-turn marker. Templates with
    {% generation %} tags mark it; for others it is found by rendering again: the conversation before the answer gives
    its start, the conversation with another text in place of the answer gives its end. Tool calls belong to the
    completion, the tools' answers do not, and neither do messages with "loss": False.

    Args:
        tokenizer: a fast Hugging Face tokenizer with a chat template.
        messages: [{"role": ..., "content": ...}, ...], those of the assistant with "tool_calls" where it calls tools.
        where: file and line, for error messages.
        tools: descriptions of functions, for the template.
        today: the day that the template sees, as YYYY-MM-DD.

    Returns:
        (ids, completion): token ids, and bool (len(ids),) True = written by the assistant.

    Raises:
        UserError: no template, a template that refuses the conversation, leaves out a part of it, hides where answers
            are or does not end; no answer.
    """
    answers = [(i, message.get("loss", True)) for i, message in enumerate(messages) if message["role"] == "assistant"]
    messages = [{name: value for name, value in message.items() if name != "loss"} for message in messages]
    if not tokenizer.chat_template:
        raise UserError(
            f"{where}: a conversation, but the tokenizer {tokenizer.name_or_path!r} has no chat template",
            'use the tokenizer of a chat model, or documents of the form {"text": ...}',
        )
    if not tokenizer.is_fast:
        raise UserError(f"{where}: conversations need a fast tokenizer, not {type(tokenizer).__name__}")
    ids, completion = _encode(_Renderer(tokenizer, tools, where, today), messages, answers)
    if not completion.any() and all(is_trained_on for _, is_trained_on in answers):
        raise UserError(
            f"{where}: a conversation without an answer from the assistant", "remove it, or give it as text"
        )
    return ids, completion


class TemplateRefusal(Exception):
    """A chat template refuses a conversation, or fails.

    Args:
        kind: name of its error.
        reason: its words.
    """

    def __init__(self, kind: str, reason: str):
        super().__init__(" ".join(reason.split()) or kind)
        self.kind, self.reason = kind, reason


@dataclass(frozen=True)
class Rendering:
    """A conversation as text.

    Attributes:
        text: what the template writes.
        spans: beginnings and ends of what is within its {% generation %} tags, in characters.
    """

    text: str
    spans: tuple[tuple[int, int], ...] = ()


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict],
    *,
    tools: list[dict] | None = None,
    template: str | None = None,
    add_generation_prompt: bool = False,
    mark: bool = False,
) -> Rendering:
    """Render a conversation as `apply_chat_template` does, within `TEMPLATE_SECONDS` and `TEMPLATE_BYTES`.

    Args:
        tokenizer: with a chat template.
        messages, tools: JSON values.
        template: its text, or the name of one of the tokenizer's; None: the one that the tokenizer chooses.
        add_generation_prompt: end with the beginning of an answer.
        mark: find the spans.

    Raises:
        TemplateRefusal: see there.
        UserError: it exceeds the bounds, or the tokenizer renders conversations by code of its own.
    """
    name = tokenizer.name_or_path
    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        raise UserError(
            f"tokenizer {name!r} renders conversations by its own code ({type(tokenizer).__name__})",
            "give them to it as texts",
        )
    try:
        template = tokenizer.get_chat_template(template, tools)
    except ValueError as error:  # it has several, and none for this
        raise TemplateRefusal("ValueError", str(error)) from error
    options = {
        **tokenizer.special_tokens_map,
        "chat_template": template,
        "tools": tools,
        "add_generation_prompt": add_generation_prompt,
        "return_assistant_tokens_mask": mark,
    }
    given = [{key: value for key, value in message.items() if value is not None} for message in messages]
    process = bounded_process(Path(__file__).with_name("render_template.py"), TEMPLATE_SECONDS, TEMPLATE_BYTES)
    try:
        answer = process.ask({"messages": given, "options": options})
    except OutOfBounds as error:
        raise UserError(
            f"the chat template of {name!r} {error}", "correct the template: it repeats too often, or calls itself"
        ) from error
    if refusal := answer.get("refusal"):
        raise TemplateRefusal(*refusal)
    return Rendering(answer["text"], tuple(map(tuple, answer["spans"])))


def _encode(render: _Renderer, messages: list[dict], answers: list[tuple[int, bool]]) -> tuple[list[int], np.ndarray]:
    tagged = render.is_tagged
    rendering = render.with_spans(messages)
    _check_all_is_shown(render, messages)
    ids, starts, ends = render.tokens(rendering.text)
    completion = np.zeros(len(ids), dtype=bool)
    for start, end in rendering.spans:
        completion |= (starts < end) & (start < ends)
    for i, is_trained_on in answers:
        if is_trained_on != tagged:  # to be marked, or no longer
            start, end = _answer_span(render, messages, i, rendering.text)
            completion[(start <= starts) & (starts < end)] = is_trained_on
    return ids, completion


def _answer_span(render: _Renderer, messages: list[dict], i: int, text: str) -> tuple[int, int]:
    """Return the span of answer i in `text`, without its generation prompt."""

    def split(replaced: list[dict]) -> tuple[str, str, str]:
        return render(replaced).partition(_STAND_IN)

    stand_in = {"role": "assistant", "content": _STAND_IN}
    if calls := messages[i].get("tool_calls"):  # where the template shows text in addition to calls, keep them
        with_calls = [*messages[:i], stand_in | {"tool_calls": calls}]
        if split(with_calls)[1]:
            stand_in = with_calls[-1]
    replaced = [*messages[:i], stand_in]
    before, alone, closing = split(replaced)
    if i:  # many templates refuse an empty conversation; there the answer begins with its content
        before = render(messages[:i], add_generation_prompt=True)
    in_front, in_whole, rest = split(replaced + messages[i + 1 :])
    if i and not text.startswith(before):
        # What came before is written differently once there is more (Qwen3 shows the last thoughts only). There the
        # answer follows the last generation prompt in front of it.
        prompt = before.removeprefix(render(messages[:i]))
        if prompt and prompt != before and prompt in in_front:
            before = in_front[: in_front.rfind(prompt) + len(prompt)]
    # `rest` is everything after the answer; a template may rewrite earlier turns (Qwen3 drops their thoughts), so
    # only what is the same in both renderings is relied on.
    end = len(text) - len(rest) + len(closing)
    if not (alone and in_whole and text.startswith(before) and text.endswith(rest) and rest.startswith(closing)):
        raise UserError(
            f"{render.where}: the chat template renders message {i + 1} differently in and out of its conversation",
            "use a template with {% generation %} tags, or single-turn conversations",
        )
    return len(before), end


def _check_all_is_shown(render: _Renderer, messages: list[dict]) -> None:
    """Refuse a template that leaves out messages, calls or tools.

    Each gets a text of its own, which has to come out. What the assistant writes next to a call may be left out, as
    templates of Llama 3 do.

    Raises:
        UserError: names what is missing.
    """
    parts: dict[str, str] = {}

    def stand_in(what: str) -> str:
        parts[text := f"@@{len(parts)}@@"] = what
        return text

    def marked_function(record: dict, what: str) -> dict:
        function = record.get("function")
        if not isinstance(function, dict) or "name" not in function:
            return record
        marked = function | {"name": stand_in(what)}
        if "arguments" in function:
            marked["arguments"] = {name: stand_in(what) for name in function["arguments"]}
        return record | {"function": marked}

    def marked_message(number: int, message: dict) -> dict:
        if message["content"].strip() and message["role"] != "assistant":
            message = message | {"content": stand_in(f"message {number} of {message['role']!r}")}
        if calls := message.get("tool_calls"):
            names = [f"the call of {call['function']['name']!r} in message {number}" for call in calls]
            message = message | {"tool_calls": list(map(marked_function, calls, names))}
        return message

    marked = [marked_message(number, message) for number, message in enumerate(messages, 1)]
    names = [f"the tool {tool.get('function', {}).get('name')!r}" for tool in render.tools or ()]
    tools = list(map(marked_function, render.tools or (), names)) or None
    try:
        text = render(marked, tools=tools)
    except UserError:  # a template that looks into texts, such as for a certain question or tool
        return
    if missing := [what for part, what in parts.items() if part not in text]:
        raise UserError(
            f"{render.where}: the chat template leaves out {missing[0]}"
            + (f" (and {len(missing) - 1} more)" if missing[1:] else ""),
            "use a teacher whose template writes it, or take it out of the data",
        )


class _Renderer:
    """A tokenizer's chat template for the conversations of one record.

    Attributes:
        tools, where: see `encode_conversation`.
        is_tagged: the template marks what the assistant writes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tools: list[dict] | None, where: str, today: str):
        self.tools, self.where = tools, where
        self._tokenizer = tokenizer
        self._template = tokenizer.get_chat_template(tools=tools)
        self.is_tagged = bool(_GENERATION.search(self._template))
        if asks_for_date(tokenizer):
            self._template = _dated(self._template, today)

    def __call__(self, messages: list[dict], **options) -> str:
        """Return the text of a conversation; options and errors are those of `with_spans`."""
        return self._rendered(messages, **options).text

    def with_spans(self, messages: list[dict]) -> Rendering:
        """Return a conversation with its spans, where the template marks them.

        Raises:
            UserError: the template refuses the conversation.
        """
        return self._rendered(messages, mark=self.is_tagged)

    def _rendered(self, messages: list[dict], **options) -> Rendering:
        try:
            return render(self._tokenizer, messages, template=self._template, **{"tools": self.tools} | options)
        except TemplateRefusal as refusal:
            raise UserError(f"{self.where}: the chat template refuses the conversation: {refusal}") from refusal
        except UserError as error:
            raise UserError(f"{self.where}: {error.cause}", error.hint) from error

    def tokens(self, text: str) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Return the ids of a text, and for each the character where it begins and the one after its end."""
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        return encoded["input_ids"], spans[:, 0], spans[:, 1]


def _dated(template: str, today: str) -> str:
    """Return a template with a `strftime_now` of its own, which hides that of transformers, and knows one day only."""
    day = datetime.fromisoformat(today)
    parts = "".join(f" | replace({code!r}, {day.strftime(code)!r})" for code in DATE_CODES)
    return f"{{% macro strftime_now(format) %}}{{{{ format{parts} }}}}{{% endmacro %}}\n{template}"
