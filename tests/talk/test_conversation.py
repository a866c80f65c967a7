"""A talk that goes on from a state says what a model says that reads all of it anew; states in files; prompts."""

import pytest
import torch
from generation_cases import build
from tiny import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from rwkvinside.errors import UserError
from rwkvinside.talk.conversation import Conversation
from rwkvinside.talk.prompts import generate
from rwkvinside.talk.state_file import read_memory, write_memory
from rwkvinside.teacher.sampling import Sampling, encode, render_chat, sample

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# as those that drop thoughts: what was said before is shortened
FORGETFUL = TEMPLATE.replace("{{ m.content }}", "{{ m.content if loop.revindex0 < 1 else m.content[:3] }}")
GREEDY = Sampling(temperature=0, max_tokens=8)


def tokenizer(template=TEMPLATE):
    special = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    return byte_tokenizer(*special, eos_token="<|end|>", chat_template=template)


@pytest.fixture(scope="module")
def hybrid():
    return bytes_model([0, 2])


def bytes_model(rwkv_layers):
    model = build(rwkv_layers=rwkv_layers)
    torch.manual_seed(1)
    words = tokenizer()
    model.resize_token_embeddings(len(words))
    # no reply has half a character, which its text could not say
    halves = [i for i in range(len(words)) if "\ufffd" in words.decode([i])]
    head = model.lm_head.weight.data
    head[halves] = head[min(set(range(len(words))) - set(halves))] / 2
    return model


def said(conversation, words, **how):
    return "".join(conversation.say(words, **how))


def from_scratch(model, words, ids, tokens=8):
    end = [words.eos_token_id]
    return words.decode(sample(model, [ids], end, tokens, GREEDY)[0], skip_special_tokens=True)


def count_reads(conversation, monkeypatch):
    read = []
    inner = conversation.model.forward
    monkeypatch.setattr(
        conversation.model, "forward", lambda ids, **how: read.append(ids.shape[1]) or inner(ids, **how)
    )
    return read


@pytest.mark.parametrize("template", [TEMPLATE, FORGETFUL], ids=["growing", "forgetful"])
def test_every_turn_is_as_if_all_were_read_anew(hybrid, template):
    words = tokenizer(template)
    talk = Conversation(hybrid, words, GREEDY, system="be brief")
    messages = [{"role": "system", "content": "be brief"}]
    for question in ("hello there", "and who are you?", "why"):
        messages.append({"role": "user", "content": question})
        whole = encode(words, render_chat(words, messages, add_generation_prompt=True))
        expected = from_scratch(hybrid, words, whole)
        assert said(talk, question) == expected.rstrip("\ufffd")  # half a character at the end is not shown
        messages.append({"role": "assistant", "content": expected})
    assert talk.memory.messages == messages


def test_only_what_is_new_is_read(hybrid, monkeypatch):
    talk = Conversation(hybrid, tokenizer(), GREEDY, system="be brief")
    read = count_reads(talk, monkeypatch)
    said(talk, "hello")
    assert read[0] == len("hello") + 2  # after the system prompt: <|end|> and <|assistant|>
    read.clear()
    said(talk, "more")
    assert read[0] == len("more") + 4  # the end of the reply, the marks of a turn
    read.clear()
    talk.reset()
    said(talk, "hello")
    assert read[0] == len("hello") + 2, "the state of the system prompt is used again"


def test_reset_brings_back_the_first_reply(hybrid):
    talk = Conversation(hybrid, tokenizer(), GREEDY, system="be brief")
    first = said(talk, "hello")
    said(talk, "something else")
    talk.reset()
    assert said(talk, "hello") == first


def test_plain_text_goes_on(hybrid):
    words = tokenizer()
    talk = Conversation(hybrid, words, GREEDY, plain=True)
    text = "once upon"
    for more in ("", " and then"):
        text += more
        expected = from_scratch(hybrid, words, encode(words, text))
        assert said(talk, more or text) == expected
        text += expected


def test_a_reply_can_be_stopped_and_the_talk_goes_on(hybrid):
    words = tokenizer()
    talk = Conversation(hybrid, words, Sampling(temperature=0, max_tokens=100), plain=True)
    asked = iter([False] * 5 + [True] * 100)
    text = "once upon" + said(talk, "once upon", stop=lambda: next(asked))
    assert talk.last.tokens == 5 and not talk.last.ended
    assert words.decode(talk.memory.ids) == text
    expected = from_scratch(hybrid, words, encode(words, text + "!"))
    talk.sampling = GREEDY
    assert said(talk, "!") == expected


def test_the_same_seed_draws_the_same(hybrid):
    how = Sampling(temperature=1.0, top_p=0.9, max_tokens=12, seed=5)
    one, other = (said(Conversation(hybrid, tokenizer(), how), "hello") for _ in range(2))
    third = said(Conversation(hybrid, tokenizer(), Sampling(max_tokens=12, seed=6)), "hello")
    assert one == other != third


def test_a_state_in_a_file(hybrid, tmp_path):
    words, file = tokenizer(), tmp_path / "state"
    talk = Conversation(hybrid, words, GREEDY)
    with pytest.raises(UserError, match="nothing was said yet"):
        write_memory(file, talk.memory, hybrid)
    said(talk, "hello")
    assert write_memory(file, talk.memory, hybrid) == file.stat().st_size
    expected = said(talk, "and then?")
    again = Conversation(hybrid, words, GREEDY)
    again.recall(read_memory(file, hybrid))
    assert said(again, "and then?") == expected and again.memory.messages == talk.memory.messages
    other = bytes_model([0, 1, 2, 3])
    with pytest.raises(UserError, match="is the state of another model"):
        read_memory(file, other)


def test_another_model_reads_the_tokens_of_a_state(hybrid, tmp_path):
    words, file, teacher = tokenizer(), tmp_path / "state", bytes_model([1])
    talk, beside = (Conversation(model, words, GREEDY, plain=True) for model in (hybrid, teacher))
    written = said(talk, "hello")
    write_memory(file, talk.memory, hybrid)
    kept = read_memory(file, hybrid)
    kept.cache = None
    beside.recall(kept)
    assert said(beside, "!") == from_scratch(teacher, words, encode(words, f"hello{written}!"))


def test_the_state_of_recurrent_layers_does_not_grow():
    sizes = []
    for layers in ([0, 1, 2, 3], [0, 2]):
        talk = Conversation(bytes_model(layers), tokenizer(), GREEDY, plain=True)
        said(talk, "hello")
        before = talk.state_bytes
        said(talk, "and a longer one")
        sizes.append((before, talk.state_bytes))
    (before, after), (some, more) = sizes
    assert before == after > 0 and more > some


def test_prompts_in_batches_are_those_alone(hybrid):
    words = tokenizer()
    prompts = ["a", "hello there", "once"]
    for plain in (True, False):
        found = generate(hybrid, words, prompts, Sampling(temperature=0, max_tokens=8, rows=2), plain=plain)
        for prompt, text in zip(prompts, found.texts, strict=True):
            asked = [{"role": "user", "content": prompt}]
            ids = encode(words, prompt if plain else render_chat(words, asked, add_generation_prompt=True))
            assert text.prompt == prompt and text.text == from_scratch(hybrid, words, ids)
    assert found.tokens == sum(each.tokens for each in found.texts) and found.to_dict()["plain"] is False


def test_a_model_of_attention_talks_too():
    torch.manual_seed(0)
    words = tokenizer()
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    talk = Conversation(model, words, GREEDY)
    first = said(talk, "hello")
    asked = encode(words, render_chat(words, [{"role": "user", "content": "hello"}], add_generation_prompt=True))
    assert first == from_scratch(model, words, asked)
