"""One record to one document: conversations of several dialects, tool calls, token ids, questions; what is refused."""

import json

import numpy as np
import pytest

from rwkvinside.data.readers import read_documents
from rwkvinside.data.records import document_of
from rwkvinside.errors import UserError

WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}


def of(**record):
    return document_of(record, "text", "a.jsonl:1")


def refused(match, **record):
    with pytest.raises(UserError, match=match) as caught:
        of(**record)
    assert "a.jsonl:1" in caught.value.cause and "\n" not in caught.value.cause + caught.value.hint


def test_sharegpt():
    turns = [("system", "S"), ("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")]
    document = of(conversations=[{"from": role, "value": text} for role, text in turns])
    roles = ["system", "user", "assistant", "user", "assistant"]
    assert document.kind == "conversation"
    assert document.messages == [{"role": r, "content": text} for r, (_, text) in zip(roles, turns, strict=True)]
    # the same under the other name, and with a separate system prompt
    assert of(conversations=document.messages) == document == of(messages=document.messages, system="not this")
    rest = [{"from": role, "value": text} for role, text in turns[1:]]
    assert of(conversations=rest, system="S") == document
    refused("a message is from 'alien'", conversations=[{"from": "alien", "value": "x"}])
    refused("a message is {'from': 'human', 'value': 5}", conversations=[{"from": "human", "value": 5}])


def test_tool_calls_of_all_dialects_are_one():
    openai = of(
        messages=[
            {"role": "user", "content": "weather?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}],
            },
            {"role": "tool", "content": "rain", "name": "weather"},
            {"role": "assistant", "content": [{"type": "text", "text": "It "}, {"type": "text", "text": "rains."}]},
        ],
        tools=[{"type": "function", "function": WEATHER}],
    )
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
    assert openai.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert openai.messages[3]["content"] == "It rains."
    sharegpt = of(
        conversations=[
            {"from": "human", "value": "weather?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Bonn"}}'},
            {"from": "observation", "value": "rain"},
            {"from": "gpt", "value": "It rains."},
        ],
        tools=json.dumps([WEATHER]),
    )
    assert sharegpt.tools == openai.tools == [{"type": "function", "function": WEATHER}]
    del openai.messages[2]["name"]
    assert sharegpt.messages == openai.messages
    assert of(messages=openai.messages).as_bytes() != openai.as_bytes()  # the tools count too


@pytest.mark.parametrize(
    "message, match",
    [
        ({"role": "assistant", "content": None}, "a message is"),
        ({"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}, "tool_calls of 'user'"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "a tool call is"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "arguments of f is not"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}, "arguments of f are"),
        ({"role": "user", "content": [{"type": "image"}]}, "a message is"),
        ({"from": "function_call", "value": "weather()"}, "function_call is not JSON"),
        ("hello", "a message is 'hello'"),
    ],
)
def test_messages_that_are_refused(message, match):
    refused(match, messages=[message])


def test_tools_that_are_refused():
    refused("'tools' is {'a': 1}", messages=[{"role": "user", "content": "x"}], tools={"a": 1})
    refused("tools is not JSON", messages=[{"role": "user", "content": "x"}], tools="[")


def test_tables_fill_in_nulls_that_were_not_there(tmp_path):
    """Parquet gives every message the fields of all, and every call the arguments of all."""
    import datasets

    calls = [
        {"type": "function", "function": {"name": name, "arguments": arguments}}
        for name, arguments in (("weather", {"city": "Bonn"}), ("time", {"zone": "CET"}))
    ]
    messages = [
        [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}] for call in calls
    ]
    records = [{"messages": m, "text": None} for m in messages]
    path = tmp_path / "calls.parquet"
    datasets.Dataset.from_list(records).to_parquet(path)
    assert [document.messages for document in read_documents(path)] == messages
    assert [document.messages for document in read_documents(f"hub:{tmp_path}")] == messages


def test_token_ids():
    document = of(input_ids=[5, 6, 7])
    assert document.kind == "tokens" and document.ids.tolist() == [5, 6, 7] and document.loss is None
    assert of(input_ids=[5, 6, 7], labels=[-100, 6, 7]).loss.tolist() == [False, True, True]
    for mask in ("loss_mask", "completion_mask", "assistant_masks"):
        assert of(input_ids=[5, 6, 7], **{mask: [0, 0, 1]}).loss.tolist() == [False, False, True]
    padded = of(input_ids=[0, 5, 6], attention_mask=[0, 1, 1], loss_mask=[1, 0, 1])
    assert (padded.ids.tolist(), padded.loss.tolist()) == ([5, 6], [False, True])
    assert of(input_ids=[]).blank
    assert of(input_ids=[1], text="text comes first").kind == "text"


@pytest.mark.parametrize(
    "record, match",
    [
        ({"input_ids": [1.5]}, "'input_ids' is \\[1.5\\]"),
        ({"input_ids": "12"}, "'input_ids' is '12'"),
        ({"input_ids": 7}, "'input_ids' is 7"),
        ({"input_ids": [[1], [2, 3]]}, "'input_ids' is"),
        ({"input_ids": [3, -1]}, "input_ids from -1 to 3"),
        ({"input_ids": [3, 2**40]}, "input_ids from 3 to"),
        ({"input_ids": [1, 2], "labels": [1]}, "1 labels for 2 input_ids"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, r"labels\[0\] is 2, input_ids\[0\] is 1"),
        ({"input_ids": [1, 2], "loss_mask": [1, 1, 0]}, "3 loss_mask for 2 input_ids"),
    ],
)
def test_token_ids_that_are_refused(record, match):
    refused(match, **record)


def test_questions_of_all_dialects_are_one():
    mmlu = of(question=" What? ", choices=["w", "x", "y", "z"], answer=2)
    assert mmlu.kind == "question" and (mmlu.question.text, mmlu.question.answer) == ("What?", 2)
    assert mmlu.question.prompt == "What?\nA. w\nB. x\nC. y\nD. z"
    arc = {"text": ["w", "x", "y", "z"], "label": ["1", "2", "3", "4"]}
    same = [
        of(question="What?", options=["w", "x", "y", "z"], answer="C"),
        of(question="What?", choices=["w", "x", "y", "z"], answer="y"),
        of(question="What?", choices=arc, answerKey="3"),
        of(question="What?", options={"A": "w", "B": "x", "C": "y", "D": "z"}, answer="C"),
    ]
    assert all(document.question == mmlu.question for document in same)
    assert len({document.as_bytes() for document in same}) == 1


def test_rotations_keep_the_answer():
    question = of(question="What?", choices=["w", "x", "y"], answer=1).question
    turns = [question.rotated(k) for k in range(3)]
    assert [turn.options for turn in turns] == [("w", "x", "y"), ("x", "y", "w"), ("y", "w", "x")]
    assert [turn.options[turn.answer] for turn in turns] == ["x"] * 3
    assert sorted(turn.answer for turn in turns) == [0, 1, 2]


@pytest.mark.parametrize(
    "record, match",
    [
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "answer 2 is not one of the 2 options"),
        ({"question": "q", "choices": ["a", "b"], "answer": "E"}, "answer 'E' is not one of the 2 options"),
        ({"question": "q", "choices": ["a", "b"]}, "answer None is not one"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "a question with options"),
        ({"question": "q", "choices": "ab", "answer": 0}, "a question with options"),
        ({"question": "q", "choices": [str(i) for i in range(27)], "answer": 0}, "27 options"),
        ({"question": "q", "answer": "a"}, "none of 'text'"),
    ],
)
def test_questions_that_are_refused(record, match):
    refused(match, **record)


def test_prompt_and_completion():
    document = of(prompt="1 + 1 =", completion=" 2")
    assert (document.kind, document.prompt, document.text) == ("completion", "1 + 1 =", " 2")
    assert of(prompt="x", completion=" ").blank
    assert not np.array_equal(document.as_bytes(), of(text="1 + 1 =").as_bytes())


def test_what_is_empty_is_absent():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    whole = of(messages=turns)
    for field in ("text", "prompt", "completion", "system", "tools"):
        assert of(messages=turns, **{field: ""}).as_bytes() == whole.as_bytes(), field
    assert of(messages=turns, conversations=[], input_ids=[], tools=[]).as_bytes() == whole.as_bytes()
    assert of(messages=[], conversations=turns).as_bytes() == whole.as_bytes()
    assert of(text=" \n", prompt="1 + 1 =", completion=" 2").kind == "completion"
    assert of(text="", input_ids=[3]).kind == "tokens"
    assert of(text="").blank and of(text="", messages=[], messages_count=0).blank


@pytest.mark.parametrize(
    "record, match",
    [
        ({"text": None}, "'text' is null, and there is no other content"),
        ({"text": None, "messages": None}, "'text' and 'messages' are null"),
        ({"messages": []}, "'messages' is not a list with at least one message"),
        (
            {"prompt": [{"role": "user", "content": "q"}], "completion": "a"},
            "'prompt' is a list and 'completion' a str",
        ),
        ({"messages": "[{"}, "messages is not JSON"),
        ({"messages": [{"role": "critic", "content": "q"}]}, "a message is from 'critic'"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}, "'assistant' has weight: 0.5"),
        ({"messages": [{"role": "assistant", "content": "a", "loss": "no"}]}, "'assistant' has loss: 'no'"),
        ({"messages": [{"role": "assistant", "content": "a", "loss": True, "weight": 0}]}, "contradict each other"),
        ({"messages": [{"role": "user", "content": "q", "train": True}]}, "only the assistant's are trained on"),
        ({"input_ids": [2**63]}, "'input_ids' is"),
        ({"messages": [{"role": "tool_call", "content": "[" * 100000}]}, "tool_call is not JSON .nested too deeply"),
    ],
)
def test_what_is_wrong_is_said_in_the_words_of_the_file(record, match):
    refused(match, **record)


def test_roles_of_all_dialects_are_one():
    call = {"name": "weather", "arguments": {"city": "Bonn"}}
    openai = of(
        messages=[
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "tool_calls": [{"function": call}, {"function": call}]},
            {"role": "tool", "content": "rain"},
            {"role": "assistant", "content": "a"},
        ]
    )
    swift = of(
        messages=[
            {"role": "developer", "content": "s"},
            {"role": "human", "content": "q"},
            {"role": "tool_call", "content": json.dumps(call)},
            {"role": "tool_call", "content": json.dumps(call)},
            {"role": "tool_response", "content": "rain"},
            {"role": "gpt", "content": "a"},
        ]
    )
    assert swift.messages == openai.messages
    first = of(messages=[{"role": "assistant", "content": "let me see", "function_call": call}])
    assert first.messages[0]["tool_calls"][0]["function"] == call
    as_json = of(messages=[json.dumps(m) for m in swift.messages])
    assert as_json.messages == of(messages=json.dumps(swift.messages)).messages == openai.messages


def test_flags_of_messages():
    turns = [{"role": "user", "content": "q", "weight": 0}, {"role": "assistant", "content": "a"}]
    for flag in ({"weight": 0}, {"loss": False}, {"train": False}, {"weight": 0, "train": False}):
        assert of(messages=[turns[0], turns[1] | flag]).messages[1]["loss"] is False
    for flag in ({}, {"weight": 1}, {"loss": True}, {"train": None}):
        assert "loss" not in of(messages=[turns[0], turns[1] | flag]).messages[1]


def test_a_prompt_and_a_completion_of_messages():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    document = of(prompt=turns + turns[:1], completion=turns[1:])
    assert document.kind == "conversation" and len(document.messages) == 4
    assert [m.get("loss", True) for m in document.messages if m["role"] == "assistant"] == [False, True]
