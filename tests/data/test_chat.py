import pytest

from rwkvinside.data.chat import encode_conversation
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
    _, runs = completions(make_tokenizer(LLAMA2))
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
    _, runs = answers(make_tokenizer(LLAMA3), errand)
    assert runs == [f"{SHOWN}<|im_end|>", f"{SHOWN}<|im_end|>", "It changes.<|im_end|>", "welcome<|im_end|>"]
    with pytest.raises(UserError, match=r"x\.jsonl:1: the chat template refuses .*only single tool-calls"):
        answers(make_tokenizer(LLAMA3), ERRAND)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(9999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
        "{% for i in range(9999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    ],
    ids=["loops", "recursion", "loops, marked"],
)
def test_a_template_without_an_end_is_refused(make_tokenizer, template, monkeypatch):
    monkeypatch.setattr("rwkvinside.data.chat.TEMPLATE_SECONDS", 0.5)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    with pytest.raises(UserError) as caught:
        encode_conversation(make_tokenizer(template), messages, "a.jsonl:1")
    said = str(caught.value).splitlines()
    assert said[0].startswith("a.jsonl:1: the chat template ") and len(said) <= 2
    assert "does not end within 0.5 seconds" in said[0] or "recursion" in said[0]
