from pathlib import Path

import pytest
from faults import time_limit
from templates import LLAMA3 as LLAMA3_0
from templates import LLAMA32, QWEN3

from rwkvinside.data import chat
from rwkvinside.data.chat import encode_conversation
from rwkvinside.data.encode import Encoder
from rwkvinside.errors import UserError

CONVERSATION = [
    {"role": "system", "content": "Be ü."},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "  first ü\n\nanswer "},
    {"role": "user", "content": "first"},
    {"role": "assistant", "content": "second"},
]
TAGGED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content | trim }}<|im_end|>{% endgeneration %}{% else %}{{ m.content | trim }}<|im_end|>{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3: only an answer after the last question has a thinking block, so earlier renderings are not prefixes.
THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content | trim }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Llama 2: no generation prompt, the answer is closed by eos only.
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }} </s>{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def completions(tokenizer, messages=CONVERSATION):
    """The runs of completion tokens, as text."""
    ids, mask = encode_conversation(tokenizer, messages, "x.jsonl:1")
    assert len(ids) == len(mask)
    runs, previous = [], False
    for token, wanted in zip(ids, mask, strict=True):
        if wanted:
            runs = runs[:-1] + [runs[-1] + [token]] if previous else runs + [[token]]
        previous = wanted
    return tokenizer.decode(ids), [tokenizer.decode(run) for run in runs]


def test_chatml(tokenizer):
    text, runs = completions(tokenizer)
    assert text == tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert runs == ["first ü\n\nanswer<|im_end|>\n", "second<|im_end|>\n"]


def test_generation_tags(make_tokenizer):
    text, runs = completions(make_tokenizer(TAGGED))
    assert text == make_tokenizer().apply_chat_template(CONVERSATION, tokenize=False)
    assert runs == ["first ü\n\nanswer<|im_end|>", "second<|im_end|>"]


def test_a_template_that_rewrites_earlier_answers(make_tokenizer):
    _, runs = completions(make_tokenizer(THINKING))
    assert runs == ["first ü\n\nanswer<|im_end|>\n", "<think>\n\n</think>\n\nsecond<|im_end|>\n"]


def test_llama2(make_tokenizer):
    _, runs = completions(make_tokenizer(LLAMA2), CONVERSATION[1:])
    assert runs == [" first ü\n\nanswer </s>", " second </s>"]


def test_an_answer_that_looks_like_the_end_of_a_turn(make_tokenizer):
    messages = [{"role": "user", "content": "a\nb"}, {"role": "assistant", "content": "user: c\nassistant: d"}]
    _, runs = completions(make_tokenizer(PLAIN), messages * 2)
    assert runs == ["user: c\nassistant: d\n"] * 2


def test_an_answer_comes_first(tokenizer):
    _, runs = completions(tokenizer, CONVERSATION[2:4])
    assert runs == ["first ü\n\nanswer<|im_end|>\n"]


def test_refusals(make_tokenizer, tokenizer):
    with pytest.raises(UserError, match=r"x\.jsonl:1: a conversation without an answer"):
        completions(tokenizer, CONVERSATION[:2])
    with pytest.raises(UserError, match=r"x\.jsonl:1: a conversation, but the tokenizer .* has no chat template"):
        completions(make_tokenizer(None))
    numbered = "{% for m in messages %}{{ messages | length }}{{ m.content }}\n{% endfor %}"
    with pytest.raises(UserError, match=r"x\.jsonl:1: the chat template renders message 3 differently"):
        completions(make_tokenizer(numbered))
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"x\.jsonl:1: .*roles must alternate"):
        completions(make_tokenizer(strict))


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
ERRAND = [
    {"role": "user", "content": "weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "rain"},
    {"role": "tool", "content": "sun"},
    {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]},
    {"role": "tool", "content": "fog"},
    {"role": "assistant", "content": "It changes."},
    {"role": "user", "content": "thanks"},
    {"role": "assistant", "content": "welcome"},
]
# As Qwen2.5: calls after the content, answers of tools together in a turn of the user.
CALLS = "{% for c in m.tool_calls %}{{ '\n<tool_call>\n' + (c.function | tojson) + '\n</tool_call>' }}{% endfor %}"
ANSWER = "{% if m.content %}{{ '\n' + m.content }}{% endif %}" + CALLS + "{{ '<|im_end|>\n' }}"
QWEN = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endif %}{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant@"
    "{% else %}<|im_start|>{{ m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Llama 3.1: a call takes the place of the content, there is one at most.
LLAMA3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}{{ raise_exception('only single tool-calls') }}{% endif %}"
    "{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHOWN = '{"name": "weather", "arguments": {"city": "Bonn"}}'


def answers(tokenizer, messages, tools=TOOLS):
    ids, mask = encode_conversation(tokenizer, messages, "x.jsonl:1", tools)
    runs = [[]]
    for token, wanted in zip(ids, mask, strict=True):
        if wanted:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return tokenizer.decode(ids), [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("tagged", [False, True])
def test_tool_calls_are_the_assistants_and_their_answers_are_not(make_tokenizer, tagged):
    answer = "{% generation %}" + ANSWER + "{% endgeneration %}" if tagged else ANSWER
    text, runs = answers(make_tokenizer(QWEN.replace("@", answer)), ERRAND)
    assert '"name": "weather", "parameters"' in text and text.count("<tool_response>") == 3
    call = f"<tool_call>\n{SHOWN}\n</tool_call>"
    expected = [f"{call}\n{call}<|im_end|>\n", f"Let me see.\n{call}<|im_end|>\n"]
    expected += ["It changes.<|im_end|>\n", "welcome<|im_end|>\n"]
    # what the template puts between its tags counts; the line end belongs to the prompt otherwise
    assert runs == [("\n" if tagged else "") + answer for answer in expected]


def test_a_template_that_shows_calls_in_place_of_the_content(make_tokenizer):
    errand = [ERRAND[0], {**ERRAND[1], "tool_calls": [CALL]}, *ERRAND[2:3], *ERRAND[4:]]
    _, runs = answers(make_tokenizer(LLAMA3), errand, None)
    assert runs == [f"{SHOWN}<|im_end|>", f"{SHOWN}<|im_end|>", "It changes.<|im_end|>", "welcome<|im_end|>"]
    with pytest.raises(UserError, match=r"x\.jsonl:1: the chat template refuses .*only single tool-calls"):
        answers(make_tokenizer(LLAMA3), ERRAND, None)


TAGS = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
LOOPS = "{% for i in range(9999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}"


@pytest.mark.parametrize(
    "template, said",
    [
        (LOOPS, "does not end within 0.5 seconds"),
        (TAGS + LOOPS, "does not end within 0.5 seconds"),
        ("{{ 7 ** (10 ** 9) }}", "does not end within 0.5 seconds"),  # one call into C
        ("{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}", "maximum recursion"),
        ("{{ 'a' * 10 ** 11 }}", "needs more than 1 GiB of memory"),
        ("{{ ('a' * 10 ** 6) | replace('a', 'a' * 10 ** 6) }}", "needs more than 1 GiB of memory"),
        (DOUBLING, "needs more than 1 GiB of memory"),
        ("{{ range(10 ** 12) | list }}", "Range too big"),
        ("{{ 'a' * 2 * 10 ** 6 }}", "it makes 2,000,000 characters of "),
    ],
)
def test_a_template_is_bounded(make_tokenizer, template, said, monkeypatch):
    if "seconds" in said:
        monkeypatch.setattr("rwkvinside.data.chat.TEMPLATE_SECONDS", 0.5)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    with pytest.raises(UserError) as caught:
        encode_conversation(make_tokenizer(template), messages, "a.jsonl:1")
    assert caught.value.cause.startswith("a.jsonl:1: the chat template ") and said in caught.value.cause
    assert "\n" not in caught.value.cause
    text, runs = completions(make_tokenizer(PLAIN), messages)  # the next one is rendered as ever
    assert runs == ["ho\n"]


def test_what_a_killed_rendering_leaves(make_tokenizer):
    """An interrupted one answers no later question."""
    script = Path(chat.__file__).with_name("render_template.py")
    process = chat.bounded_process(script, chat.TEMPLATE_SECONDS, chat.TEMPLATE_BYTES)
    completions(make_tokenizer(PLAIN))
    with pytest.raises(TimeoutError), time_limit(0.3):
        process.ask({"messages": [], "options": {"chat_template": LOOPS}})
    assert "first" in completions(make_tokenizer(PLAIN))[0]


def test_a_tokenizer_that_renders_by_itself_is_refused(make_tokenizer):
    tokenizer = make_tokenizer(PLAIN)
    tokenizer.__class__ = type("Own", (type(tokenizer),), {"apply_chat_template": lambda self, *_, **__: "mine"})
    with pytest.raises(UserError, match=r"a\.jsonl:1: tokenizer .* renders conversations by its own code \(Own\)"):
        encode_conversation(tokenizer, CONVERSATION, "a.jsonl:1")


def conversations(name):
    """The messages and tools of a case of thoughts, tools and several turns, from `shared`."""
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
    thinks, silent = "<think>\nT1\n</think>\n\n", ""
    turns = [("user", "U1"), ("assistant", thinks), ("tool", "7"), ("assistant", "A1"), ("user", "U2")]
    turns += [("assistant", "A2")]
    cases = {
        "thoughts": turns,
        "no thoughts": [(role, silent if text == thinks else text) for role, text in turns],
        "two answers": [("user", "U1"), ("assistant", "A1"), ("assistant", "A1b"), ("user", "U2"), ("assistant", "A2")],
        "two last answers": [("user", "U1"), ("assistant", "A1"), ("assistant", "A1b")],
        "last thoughts": turns[:4],
    }
    messages = [{"role": role, "content": text} for role, text in cases[name]]
    return [m | {"tool_calls": [call]} if m["content"] in (thinks, silent) else m for m in messages]


EMPTY = "<think>\n\n</think>\n\n"
WEATHER_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call><|im_end|>\n'


@pytest.mark.parametrize(
    "name, expected",
    [
        ("thoughts", [WEATHER_CALL, "A1<|im_end|>\n", f"{EMPTY}A2<|im_end|>\n"]),
        ("no thoughts", [WEATHER_CALL, "A1<|im_end|>\n", f"{EMPTY}A2<|im_end|>\n"]),
        ("two answers", ["A1<|im_end|>\n", "A1b<|im_end|>\n", f"{EMPTY}A2<|im_end|>\n"]),
        ("two last answers", ["A1<|im_end|>\n", f"{EMPTY}A1b<|im_end|>\n"]),
        ("last thoughts", [f"<think>\nT1\n</think>\n\n{WEATHER_CALL}", f"{EMPTY}A1<|im_end|>\n"]),
    ],
)
def test_qwen3_with_thoughts_tools_and_turns(make_tokenizer, name, expected):
    tokenizer, messages = make_tokenizer(QWEN3), conversations(name)
    text, runs = answers(tokenizer, messages, None)
    assert text == tokenizer.apply_chat_template(messages, tokenize=False)
    assert runs == expected
    assert ("T1" in text) == (name == "last thoughts")


@pytest.mark.parametrize("tagged", [False, True])
def test_messages_that_are_not_trained_on(make_tokenizer, tagged):
    messages = [dict(m) for m in CONVERSATION]
    messages[2]["loss"] = False
    tokenizer = make_tokenizer(TAGGED) if tagged else make_tokenizer()
    whole, _ = completions(tokenizer)
    text, runs = completions(tokenizer, messages)
    assert text == whole and runs == ["second<|im_end|>" + ("" if tagged else "\n")]
    messages[4]["loss"] = False
    assert completions(tokenizer, messages) == (whole, [])


@pytest.mark.parametrize(
    "message, missing",
    [
        ({"role": "assistant", "content": "", "tool_calls": [CALL]}, "the call of 'weather' in message 2"),
        ({"role": "tool", "content": "rain"}, "message 2 of 'tool'"),
        ({"role": "system", "content": "rain"}, "message 2 of 'system'"),
    ],
)
@pytest.mark.parametrize("tagged", [False, True])
def test_a_template_that_leaves_something_out(make_tokenizer, message, missing, tagged):
    """Also where the same word is somewhere else."""
    shown = "{% for m in messages %}{% if m.role in ('user', 'assistant') %}{{ m.role }}@{% endif %}{% endfor %}"
    content = "{% generation %}{{ m.content }}\n{% endgeneration %}" if tagged else "{{ m.content }}\n"
    messages = [{"role": "user", "content": "weather, rain"}, message, {"role": "assistant", "content": "rain"}]
    with pytest.raises(UserError, match=rf"x\.jsonl:1: the chat template leaves out {missing}"):
        answers(make_tokenizer(shown.replace("@", content)), messages, None)


def test_a_template_without_tools(make_tokenizer):
    with pytest.raises(UserError, match="the chat template leaves out the tool 'weather'"):
        answers(make_tokenizer(LLAMA3_0), CONVERSATION[1:3])


def test_the_day_is_that_of_the_configuration(make_tokenizer):
    tokenizer = make_tokenizer(LLAMA32)
    texts = [
        tokenizer.decode(encode_conversation(tokenizer, CONVERSATION, "x", **day)[0])
        for day in ({}, {"today": "2031-12-09"})
    ]
    assert "Today Date: 26 Jul 2024" in texts[0] and "Today Date: 09 Dec 2031" in texts[1]
    assert Encoder(tokenizer).identity["today"] == "2024-07-26"
    assert "today" not in Encoder(make_tokenizer()).identity  # where it changes nothing
