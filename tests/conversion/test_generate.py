"""Text that a tiny teacher writes: texts, conversations, what an interruption leaves, and what is refused."""

import json
import re
from functools import partial

import pytest
import torch
from tiny import byte_tokenizer, save_qwen3
from transformers import AutoModelForCausalLM, AutoTokenizer

from rwkvinside.cli.main import main
from rwkvinside.conversion import generate
from rwkvinside.data.readers import DocumentReader
from rwkvinside.errors import UserError
from rwkvinside.support.progress import Progress
from rwkvinside.teacher.sampling import Sampling, UserTurn, sample, text_start

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMALL = ["--max-tokens", "12", "--rows", "4", "--tokens", "150"]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Two random teachers of 257 and 259 ids: one for texts, one with a chat template."""
    root = tmp_path_factory.mktemp("teachers")
    save_qwen3(root / "base", byte_tokenizer("<eos>", eos_token="<eos>"), max_position_embeddings=256)
    chat = byte_tokenizer("<|im_start|>", "<|im_end|>", "<eos>", eos_token="<eos>", chat_template=CHATML)
    save_qwen3(root / "chat", chat, max_position_embeddings=512)
    return root


def write(teacher, out, *more):
    return main(["data", "generate", "--teacher", str(teacher), "--out", str(out), *SMALL, *map(str, more)])


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_base_model_continues_from_the_token_that_begins_a_text(teachers, tmp_path, capsys):
    out = tmp_path / "new" / "texts.jsonl"
    assert write(teachers / "base", out) == 0
    texts = records(out)
    assert texts and all(list(each) == ["text"] and each["text"].strip() for each in texts)
    assert f"{out}: {len(texts)} texts; train on it with --data {out}" in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["texts.jsonl"]
    assert len(list(DocumentReader(out))) == len(texts)  # the trainer reads it
    again, other = tmp_path / "again.jsonl", tmp_path / "other.jsonl"
    assert write(teachers / "base", again) == write(teachers / "base", other, "--seed", 1) == 0
    assert again.read_text() == out.read_text() != other.read_text()


def test_given_beginnings_are_used_in_order(teachers, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "texts.jsonl"
    prompts.write_text("One\n\n two \nThree\n")
    assert write(teachers / "base", out, "--prompts", prompts, "--temperature", 0) == 0
    begun = [each["text"] for each in records(out)]
    assert [text[:3] for text in begun[:6]] == ["One", "two", "Thr"] * 2
    assert begun[0] == begun[3]  # the likeliest tokens


def test_a_chat_model_asks_and_answers(teachers, tmp_path):
    out = tmp_path / "chat.jsonl"
    assert write(teachers / "chat", out) == 0
    for record in records(out):
        assert [message["role"] for message in record["messages"]] == ["user", "assistant"]
        assert all(message["content"] for message in record["messages"])
    assert all(document.messages for document in DocumentReader(out))
    prompts = tmp_path / "questions.txt"
    prompts.write_text("Why?\n")
    assert write(teachers / "chat", tmp_path / "given.jsonl", "--prompts", prompts) == 0
    assert {record["messages"][0]["content"] for record in records(tmp_path / "given.jsonl")} == {"Why?"}
    assert write(teachers / "chat", tmp_path / "plain.jsonl", "--plain") == 0
    assert all("text" in record for record in records(tmp_path / "plain.jsonl"))


def test_the_users_turn_is_what_the_template_surrounds(teachers):
    tokenizer = AutoTokenizer.from_pretrained(teachers / "chat")
    model = AutoModelForCausalLM.from_pretrained(teachers / "chat")
    turn = UserTurn.of(tokenizer, model)
    assert tokenizer.decode(turn.before) == "<|im_start|>user\n"
    assert tokenizer.convert_ids_to_tokens(turn.end) == ["<|im_end|>", "<eos>"]
    for template, cause in (
        ("{{ messages[0].content | upper }}", "changes what a user says"),
        ("{{ 'User: ' + messages[0].content + '\\n' }}", "no token of its own"),
        ("{{ raise_exception('no') }}", "refuses a conversation: no"),
    ):
        tokenizer.chat_template = template
        with pytest.raises(UserError, match=cause):
            UserTurn.of(tokenizer, model)


def test_samples_are_those_of_each_prompt_alone(teachers):
    """Padding on the left and the rows beside it change nothing; what ends a text is not part of it."""
    model = AutoModelForCausalLM.from_pretrained(teachers / "base").eval()
    prompts, likeliest = [[1, 2, 3, 4], [5], [9, 8]], Sampling(temperature=0)
    together = sample(model, prompts, [], 10, likeliest)
    assert together == [sample(model, [prompt], [], 10, likeliest)[0] for prompt in prompts]
    assert all(len(row) == 10 for row in together)
    said = []
    assert together == sample(model, prompts, [], 10, likeliest, lambda *args: said.append(args))
    assert said == [(0, f"token {n} of 10") for n in range(1, 11)]  # a batch may take long: each token counts
    end = together[0][4]
    assert sample(model, prompts[:1], [end], 10, likeliest)[0] == together[0][: together[0].index(end)]


@pytest.mark.parametrize("kind", ["base", "chat"])
def test_a_batch_shows_how_far_it_is_while_it_is_written(teachers, tmp_path, monkeypatch, capsys, kind):
    monkeypatch.setattr(generate, "Progress", partial(Progress, interval=0))
    assert write(teachers / kind, tmp_path / "texts.jsonl") == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert re.fullmatch(r"writing 0/150 tokens  token 1 of \d+", first), first


def test_draws_follow_the_models_distribution(teachers):
    """4,000 first tokens: their frequencies are the model's probabilities, cut to top_p."""
    model = AutoModelForCausalLM.from_pretrained(teachers / "base").eval()
    with torch.no_grad():
        wanted = (model(torch.tensor([[7, 7]])).logits[0, -1] / 0.7).softmax(0)
    order = wanted.argsort(descending=True)
    kept = order[: int((wanted[order].cumsum(0) < 0.6).sum()) + 1]
    torch.manual_seed(0)
    drawn = sample(model, [[7, 7]] * 4000, [], 1, Sampling(temperature=0.7, top_p=0.6))
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=len(wanted))
    assert set(counts.nonzero().flatten().tolist()) <= set(kept.tolist())
    expected = 4000 * wanted[kept] / wanted[kept].sum()
    assert ((counts[kept] - expected) ** 2 / expected).sum() < len(kept) + 5 * (2 * len(kept)) ** 0.5  # chi-squared


def test_an_interrupted_file_goes_on_to_the_same_result(teachers, tmp_path, monkeypatch, capsys):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "texts.jsonl"
    assert write(teachers / "base", whole) == 0
    partial = tmp_path / ".texts.jsonl.partial"
    real, calls = generate.sample, []

    def stop(*args):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(generate, "sample", stop)
    assert write(teachers / "base", out) == 75
    assert not out.exists() and len(partial.read_bytes().splitlines()) == 3  # settings, and two batches
    assert "the same command again goes on" in capsys.readouterr().err
    with partial.open("a") as file:
        file.write('{"tokens": 9, "rec')  # what a power cut leaves
    monkeypatch.setattr(generate, "sample", real)
    assert write(teachers / "base", out, "--seed", 5) == 2
    assert "was begun with another seed (0, now 5)" in capsys.readouterr().err
    assert write(teachers / "chat", out) == 2
    assert "was begun with another teacher" in capsys.readouterr().err
    assert write(teachers / "base", out) == 0
    assert out.read_text() == whole.read_text() and not partial.exists()


@pytest.mark.parametrize(
    "more, cause",
    [
        (["--temperature", "-1"], "temperature -1"),
        (["--temperature", "nan"], "temperature nan"),
        (["--temperature", "hot"], "'hot' is not a number"),
        (["--top-p", "0"], "top_p 0"),
        (["--top-p", "1.5"], "top_p 1.5"),
        (["--max-tokens", "257"], "prompts of up to 0 tokens and max_tokens 257 are too long together"),
        (["--tokens", "none"], "'none' is not a positive number"),
        (["--prompts", "no.txt"], "prompts no.txt cannot be read: No such file"),
        (["--prompts", "blank.txt"], "prompts blank.txt are empty"),
        (["--prompts", "latin.txt"], "prompts latin.txt are not UTF-8"),
        (["--out", "texts.json"], "does not end in .jsonl"),
        (["--out", "there.jsonl"], "output there.jsonl exists"),
        (["--teacher", "nobody"], "teacher 'nobody' is neither"),
    ],
)
def test_one_line_for_what_cannot_be(teachers, tmp_path, monkeypatch, capsys, more, cause):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "there.jsonl").write_text("{}\n")
    assert write(teachers / "base", "out.jsonl", *more) == 2
    first, *rest = capsys.readouterr().err.splitlines()
    assert first.startswith("error: ") and cause in first and len(rest) <= 1
    assert not (tmp_path / "out.jsonl").exists() and not list(tmp_path.glob(".*"))


def test_a_teacher_that_says_nothing_is_given_up(teachers, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate, "sample", lambda model, prompts, *rest: [[] for _ in prompts])
    assert write(teachers / "base", tmp_path / "out.jsonl") == 2
    assert "wrote nothing in 80 texts" in capsys.readouterr().err


def test_a_full_disk_is_one_line(teachers, tmp_path, monkeypatch, capsys):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(generate, "fsync", full)
    assert write(teachers / "base", tmp_path / "out.jsonl") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert text_start(byte_tokenizer("<s>", bos_token="<s>")) == [256]
