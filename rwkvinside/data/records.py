"""From one record of a file or dataset (a mapping of fields) to one document. Knows no files and no tokenizer.

A record is a text, a prompt with its completion, a conversation (messages, or ShareGPT's conversations), token ids, or
a multiple-choice question; the first of these that is present counts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from .batch import IGNORE

# Fields that are read in addition to the one with the text.
MASKS = ("loss_mask", "completion_mask", "assistant_masks")
FIELDS = (
    *("prompt", "completion", "messages", "conversations", "system", "tools"),
    *("input_ids", "labels", "attention_mask", *MASKS),
    *("question", "choices", "options", "answer", "answerKey"),
)
SHAREGPT_ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "function", "function_response", "observation"), "tool"),
    "function_call": "assistant",
}
MESSAGE_TEXTS = ("name", "tool_call_id", "reasoning_content")  # copied unchanged: templates may show them
LARGEST_ID = 2**32 - 1


@dataclass(frozen=True)
class Question:
    """A multiple-choice question.

    Attributes:
        answer: index of the right option.
    """

    text: str
    options: tuple[str, ...]
    answer: int

    def rotated(self, by: int) -> Question:
        """Return the same question with its options moved up by this many places."""
        count = len(self.options)
        options = tuple(self.options[(i + by) % count] for i in range(count))
        return Question(self.text, options, (self.answer - by) % count)

    @property
    def letters(self) -> list[str]:
        """Letters of the options: A, B, ..."""
        return [chr(ord("A") + i) for i in range(len(self.options))]

    @property
    def prompt(self) -> str:
        """The question and its options by letter."""
        return "\n".join([self.text, *(f"{a}. {b}" for a, b in zip(self.letters, self.options, strict=True))])


@dataclass(frozen=True)
class Document:
    """The content of one record; one of text, messages, ids and question is set.

    Attributes:
        where: file and line, or source and row, for error messages.
        text: with `prompt`, what follows it.
        prompt: precedes the text and carries no loss.
        messages, tools: a conversation, as Hugging Face chat templates take it.
        ids: uint32 token ids.
        loss: bool like ids, True = may be a target; None: all may.
        question: multiple choice.
    """

    where: str
    text: str | None = None
    prompt: str = ""
    messages: list[dict] | None = None
    tools: list[dict] | None = None
    ids: np.ndarray | None = None
    loss: np.ndarray | None = None
    question: Question | None = None

    @property
    def kind(self) -> str:
        """One of text, completion, conversation, tokens, question."""
        if self.text is not None:
            return "completion" if self.prompt else "text"
        return "conversation" if self.messages is not None else "tokens" if self.ids is not None else "question"

    @property
    def blank(self) -> bool:
        """Whether there is nothing to learn from: only white space, or no token."""
        return not self.text.strip() if self.text is not None else self.ids is not None and not len(self.ids)

    def as_bytes(self) -> bytes:
        """Return the content as bytes; equal documents give equal bytes.

        Raises:
            UserError: the text holds half of a surrogate pair, which is not Unicode text.
        """
        if self.ids is not None:
            return self.ids.tobytes()
        if self.question is not None:
            content = _canonical([self.question.text, self.question.options, self.question.answer])
        elif self.messages is not None:
            content = _canonical([self.messages, self.tools] if self.tools else self.messages)
        else:
            content = self.prompt + self.text
        try:
            return content.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(
                f"{self.where}: the text holds a lone surrogate ({content[:40]!r}...)", "repair the \\uD8xx escape"
            ) from None


def content_hash(content: bytes) -> int:
    """Return 64 bits that tell documents apart."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def document_of(record: object, text_column: str, where: str) -> Document:
    """Return the document that a record holds.

    Args:
        record: what was read; anything but a mapping is refused.
        text_column: the field that holds a text.
        where: for messages.

    Raises:
        UserError: none of the known fields is present, or one has the wrong type.
    """
    if not isinstance(record, dict):
        raise UserError(f"{where}: a {type(record).__name__}, not an object", 'expected an object: {"text": ...}')
    text = record.get(text_column)
    if isinstance(text, str):
        return Document(where, text=text)
    if isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
        return Document(where, text=record["completion"], prompt=record["prompt"])
    for field in ("messages", "conversations"):
        if record.get(field) is not None:
            return _conversation(record, field, where)
    if record.get("input_ids") is not None:
        return _tokens(record, where)
    if record.get("question") is not None and _options_field(record) is not None:
        return _question(record, where)
    if text is not None:
        raise UserError(f"{where}: {text_column!r} is a {type(text).__name__}, not a text")
    raise no_content(where, text_column, record)


def no_content(where: str, text_column: str, columns: Iterable[str]) -> UserError:
    """Return the error for a record or table that holds no document."""
    known = f"{text_column!r}, 'messages', 'conversations', 'prompt' with 'completion', 'input_ids', 'question'"
    return UserError(
        f"{where}: none of {known} among {sorted(columns)}",
        "name the field that holds the text: data.text_column=FIELD, or --text-column of `rwkvinside data`",
    )


def without_nulls(value):
    """Remove null fields, which tables add where other records have a value."""
    if isinstance(value, dict):
        return {key: without_nulls(field) for key, field in value.items() if field is not None}
    return [without_nulls(element) for element in value] if isinstance(value, list) else value


def _canonical(value) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _conversation(record: dict, field: str, where: str) -> Document:
    turns = record[field]
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: {field!r} is not a list with at least one message")
    messages = [_message(turn, where) for turn in turns]
    if isinstance(record.get("system"), str) and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": record["system"]})
    tools = record.get("tools")
    if isinstance(tools, str):
        tools = _from_json(tools, "tools", where) if tools.strip() else None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise UserError(f"{where}: 'tools' is {tools!r:.60}", "expected a list of function descriptions")
    wrapped = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools or ()]
    return Document(where, messages=messages, tools=wrapped or None)


def _message(turn: object, where: str) -> dict:
    wrong = UserError(f"{where}: a message is {turn!r:.80}", 'expected {"role": "user", "content": "..."}')
    if not isinstance(turn, dict):
        raise wrong
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        content = "".join(str(part.get("text", "")) for part in content)
    calls = turn.get("tool_calls")
    if "role" not in turn and isinstance(role, str):
        if role not in SHAREGPT_ROLES:
            raise UserError(f"{where}: a message is from {role!r}", f"known senders: {', '.join(SHAREGPT_ROLES)}")
        if role == "function_call":
            if not isinstance(content, str):
                raise wrong
            calls = _from_json(content, "function_call", where)
            calls, content = calls if isinstance(calls, list) else [calls], None
        role = SHAREGPT_ROLES[role]
    if not isinstance(role, str) or not (isinstance(content, str) or (content is None and calls)):
        raise wrong
    message = {"role": role, "content": content or ""}
    if calls:
        if role != "assistant" or not isinstance(calls, list):
            raise UserError(
                f"{where}: tool_calls of {role!r}: {calls!r:.60}", "only the assistant may call tools, in a list"
            )
        message["tool_calls"] = [_call(call, where) for call in calls]
    return message | {key: turn[key] for key in MESSAGE_TEXTS if isinstance(turn.get(key), str)}


def _call(record: object, where: str) -> dict:
    """Return a tool call with its arguments as a mapping.

    Most templates would quote arguments that are JSON text a second time.
    """
    function = record.get("function", record) if isinstance(record, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{where}: a tool call is {record!r:.80}", 'expected {"function": {"name", "arguments"}}')
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _from_json(arguments, f"the arguments of {function['name']}", where) if arguments.strip() else {}
    if arguments is not None and not isinstance(arguments, dict):
        raise UserError(f"{where}: the arguments of {function['name']} are {arguments!r:.60}", "expected an object")
    call = {"type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}
    return call | ({"id": record["id"]} if isinstance(record.get("id"), str) else {})


def _from_json(text: str, what: str, where: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: {what} is not JSON ({error.msg}): {text[:60]!r}") from None


def _tokens(record: dict, where: str) -> Document:
    ids = _integers(record["input_ids"], "input_ids", where)
    if len(ids) and not 0 <= ids.min() <= ids.max() <= LARGEST_ID:
        raise UserError(f"{where}: input_ids from {ids.min()} to {ids.max()}", "token ids are not negative")
    loss = None
    if record.get("labels") is not None:
        labels = _like(record["labels"], "labels", ids, where)
        loss = labels != IGNORE
        if (wrong := np.flatnonzero(loss & (labels != ids))).size:
            t = wrong[0]
            raise UserError(
                f"{where}: labels[{t}] is {labels[t]}, input_ids[{t}] is {ids[t]}",
                f"labels must repeat input_ids unshifted, with {IGNORE} where there is no loss",
            )
    for field in MASKS:
        if record.get(field) is not None:
            mask = _like(record[field], field, ids, where) != 0
            loss = mask if loss is None else loss & mask
    if record.get("attention_mask") is not None:
        real = _like(record["attention_mask"], "attention_mask", ids, where) != 0
        ids, loss = ids[real], None if loss is None else loss[real]
    return Document(where, ids=ids.astype(np.uint32), loss=loss)


def _integers(values: object, field: str, where: str) -> np.ndarray:
    try:
        array = np.asarray(values if len(values) else np.empty(0, np.int64))
    except (TypeError, ValueError):
        array = np.empty((0, 0))
    if array.ndim != 1 or array.dtype.kind not in "iub":
        raise UserError(f"{where}: {field!r} is {values!r:.60}", "expected a list of integers")
    return array.astype(np.int64)


def _like(values: object, field: str, ids: np.ndarray, where: str) -> np.ndarray:
    array = _integers(values, field, where)
    if len(array) != len(ids):
        raise UserError(f"{where}: {len(array)} {field} for {len(ids)} input_ids", "give one for each token")
    return array


def _options_field(record: dict) -> str | None:
    return next((field for field in ("choices", "options") if record.get(field) is not None), None)


def _question(record: dict, where: str) -> Document:
    choices, answer = record[_options_field(record)], record.get("answer", record.get("answerKey"))
    labels: list = []
    if isinstance(choices, dict):  # as in ARC: {"text": [...], "label": [...]}; or by letter: {"A": ..., "B": ...}
        by_letter = "text" not in choices
        labels = list(choices) if by_letter else choices["label"]
        choices = list(choices.values()) if by_letter else choices["text"]
    options = tuple(choices) if isinstance(choices, list) else ()
    if not isinstance(record["question"], str) or not all(isinstance(o, str) for o in options) or len(options) < 2:
        raise UserError(
            f"{where}: a question with options {choices!r:.60}",
            'expected {"question", "choices": ["...", ...], "answer"}',
        )
    if len(options) > 26:
        raise UserError(f"{where}: a question with {len(options)} options", "give at most 26, for the letters A to Z")
    index = _answer_index(answer, options, labels or [chr(ord("A") + i) for i in range(len(options))])
    if index is None:
        raise UserError(
            f"{where}: answer {answer!r:.60} is not one of the {len(options)} options",
            "give its index from 0, its letter, or its text",
        )
    return Document(where, question=Question(record["question"].strip(), options, index))


def _answer_index(answer: object, options: tuple[str, ...], labels: list) -> int | None:
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer if 0 <= answer < len(options) else None
    if answer in labels:
        return labels.index(answer)
    return options.index(answer) if answer in options else None
