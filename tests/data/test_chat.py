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
# As Qwen3: only an answer behind the last question has a thinking block, so earlier renderings are no prefixes.
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
