"""From one record of a file or dataset (a mapping of fields) to one document. Knows no files and no tokenizer.

A record is a text, a prompt with its completion, a conversation (messages, ShareGPT's conversations, or prompt and
completion as messages), token ids, or a multiple-choice question; the first of these that is present counts, and what
is empty is absent.
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
# Whose message it is, in the words of OpenAI, ShareGPT, ms-swift and Llama -> in those of chat templates.
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(
        ("tool", "function", "function_response", "tool_response", "observation", "ipython"),
        "tool",
    ),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
}
CALLS = ("function_call", "tool_call")  # whose content is a call, or a list of them, as JSON
LOSS_FLAGS = ("weight", "loss", "train")  # of a message: 0 or false, it is not trained on
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
        messages, tools: a conversation, as Hugging Face chat templates take it; a message that is not to be trained on
            has "loss": False.
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
    text, completion = record.get(text_column), record.get("completion")
    if isinstance(text, str) and text.strip():
        return Document(where, text=text)
    if isinstance(record.get("prompt"), str) and isinstance(completion, str) and completion.strip():
        return Document(where, text=completion, prompt=record["prompt"])
    if isinstance(completion, list) and completion and _holds(record, "prompt"):
        return _conversation(record, ("prompt", "completion"), where)
    for field in ("messages", "conversations"):
        if _holds(record, field):
            return _conversation(record, (field,), where)
    if _holds(record, "input_ids"):
        return _tokens(record, where)
    if record.get("question") is not None and _options_field(record) is not None:
        return _question(record, where)
    return _nothing(record, text_column, where)


def _holds(record: dict, field: str) -> bool:
    """Return whether a field has a content: unified tables fill in "" and [] where a record has none."""
    value = record.get(field)
    return bool(value.strip()) if isinstance(value, str) else value is not None and value != []


def _nothing(record: dict, text_column: str, where: str) -> Document:
    """Return a blank document for a record whose content is empty, and refuse one that has none.

    Raises:
        UserError: tells null from empty, of another type, and missing.
    """
    text = record.get(text_column)
    if isinstance(text, str) or isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
        return Document(where, text="")
    if text is not None:
        raise UserError(f"{where}: {text_column!r} is a {type(text).__name__}, not a text")
    if record.get("input_ids") is not None:
        return _tokens(record, where)
    contents = (text_column, "messages", "conversations", "prompt", "completion", "input_ids", "question")
    if _holds(record, "prompt") and _holds(record, "completion"):
        kinds = f"{type(record['prompt']).__name__} and 'completion' a {type(record['completion']).__name__}"
        raise UserError(f"{where}: 'prompt' is a {kinds}", "give two texts, or two lists of messages")
    if nulls := [repr(name) for name in contents if name in record and record[name] is None]:
        raise UserError(
            f"{where}: {' and '.join(nulls)} {'are' if nulls[1:] else 'is'} null, and there is no other content",
            "fill it in, or remove the record",
        )
    for name in ("messages", "conversations"):
        if name in record:
            raise UserError(f"{where}: {name!r} is not a list with at least one message")
    raise no_content(where, text_column, record)


def no_content(where: str, text_column: str, columns: Iterable[str]) -> UserError:
    """Return the error for a record or table that holds no document."""
    known = f"{text_column!r}, 'messages', 'conversations', 'prompt' with 'completion', 'input_ids', 'question'"
    return UserError(
        f"{where}: none of {known} among {sorted(columns)}",
        "name the field that holds the text: data.text_column=FIELD, or --text-column of `rwkvinside data`",
    )


def of_table(record: dict) -> dict:
    """Return a row of a table without null fields inside of its columns.

    Tables add them where other records have a value.
    """
    return {name: without_nulls(value) for name, value in record.items()}


def without_nulls(value):
    """Remove null fields from mappings, at any depth."""
    if isinstance(value, dict):
        return {key: without_nulls(field) for key, field in value.items() if field is not None}
    return [without_nulls(element) for element in value] if isinstance(value, list) else value


def _canonical(value) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _conversation(record: dict, fields: tuple[str, ...], where: str) -> Document:
    """Return the conversation in some fields of a record, one after another; the last one is trained on."""
    messages: list[dict] = []
    for field in fields:
        turns = _listed(record[field], field, where)
        if not isinstance(turns, list) or not turns:
            raise UserError(f"{where}: {field!r} is not a list with at least one message")
        for turn in turns:
            _add_message(messages, turn, where)
        if field != fields[-1]:
            messages = [m | {"loss": False} if m["role"] == "assistant" else m for m in messages]
    system = record.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    tools = _listed(record.get("tools") or None, "tools", where)
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise UserError(f"{where}: 'tools' is {tools!r:.60}", "expected a list of function descriptions")
    wrapped = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools or ()]
    return Document(where, messages=messages, tools=wrapped or None)


def _listed(value: object, what: str, where: str):
    """Return a list whose elements, or which itself, may be given as JSON, as tables of mixed types have it."""
    if isinstance(value, str):
        value = _from_json(value, what, where) if value.strip() else None
    if isinstance(value, list):
        is_json = [isinstance(entry, str) and entry.lstrip().startswith("{") for entry in value]
        value = [_from_json(x, what, where) if given else x for x, given in zip(value, is_json, strict=True)]
    return value


def _add_message(messages: list[dict], turn: object, where: str) -> None:
    """Append a message; calls that follow one another, one in a message, belong to one answer."""
    message = _message(turn, where)
    role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    if (
        role in CALLS
        and messages
        and messages[-1].get("tool_calls")
        and messages[-1].get("loss") == message.get("loss")
    ):
        messages[-1]["tool_calls"] += message["tool_calls"]
    else:
        messages.append(message)


def _message(turn: object, where: str) -> dict:
    wrong = UserError(f"{where}: a message is {turn!r:.80}", 'expected {"role": "user", "content": "..."}')
    if not isinstance(turn, dict):
        raise wrong
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        content = "".join(str(part.get("text", "")) for part in content)
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else None)
    if not isinstance(role, str):
        raise wrong
    if role not in ROLES:
        raise UserError(f"{where}: a message is from {role!r}", f"known roles: {', '.join(ROLES)}")
    if role in CALLS:
        if not isinstance(content, str):
            raise wrong
        calls = _from_json(content, role, where)
        calls, content = calls if isinstance(calls, list) else [calls], None
    role = ROLES[role]
    if not (isinstance(content, str) or (content is None and calls)):
        raise wrong
    message = {"role": role, "content": content or ""}
    if not _is_trained_on(turn, role, where):
        message["loss"] = False
    if calls:
        if role != "assistant" or not isinstance(calls, list):
            raise UserError(
                f"{where}: tool_calls of {role!r}: {calls!r:.60}", "only the assistant may call tools, in a list"
            )
        message["tool_calls"] = [_call(call, where) for call in calls]
    return message | {key: turn[key] for key in MESSAGE_TEXTS if isinstance(turn.get(key), str)}


def _is_trained_on(turn: dict, role: str, where: str) -> bool:
    """Return what the flags of a message say: 0 or false, it is not trained on."""
    flags = {name: turn[name] for name in LOSS_FLAGS if turn.get(name) is not None}
    for name, value in flags.items():
        if not isinstance(value, (int, float)) or value not in (0, 1):
            raise UserError(
                f"{where}: a message of {role!r} has {name}: {value!r:.40}",
                "allowed: 1 or true, it is trained on; 0 or false, it is not",
            )
    if len(set(map(bool, flags.values()))) > 1:
        raise UserError(f"{where}: a message of {role!r} has {flags}, which contradict each other", "leave one of them")
    if role != "assistant" and any(flags.values()):
        raise UserError(
            f"{where}: a message of {role!r} has {flags}, but only the assistant's are trained on",
            "leave the flag out, or make it false",
        )
    return all(flags.values())


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


def json_problem(error: Exception) -> str:
    """Return what a text that is not JSON suffers from, for an error of `json.loads`."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number of more than 4,300 digits"


def _from_json(text: str, what: str, where: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {what} is not JSON ({json_problem(error)}): {text[:60]!r}") from None


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
    except (TypeError, ValueError, OverflowError):
        array = np.empty((0, 0))
    if array.ndim != 1 or array.dtype.kind not in "iub" or array.dtype == np.uint64:
        raise UserError(f"{where}: {field!r} is {values!r:.60}", "expected a list of integers below 2^63")
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
