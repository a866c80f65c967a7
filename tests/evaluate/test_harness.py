"""Tasks of lm-evaluation-harness that are files here, on a model whose answers can be computed by hand."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rwkvinside.errors import UserError
from rwkvinside.evaluate.harness import Harness, TaskScore, answers_of, relative_scores, run_on_both

pytest.importorskip("lm_eval", reason='needs the extra "eval"')

WORDS = ["<unk>", "<s>", "the", "cat", "dog", "sun", "is", "red", "big", "old", "a"]
CHOICE = """\
task: animals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
WRITE = """\
task: write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{question}}}}"
generation_kwargs: {{until: ["zzz"], do_sample: false, max_gen_toks: 3}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
QUESTIONS = [("the cat is", ["red", "big", "old"], 0), ("the sun is", ["a", "big"], 1), ("a dog is", ["the", "sun"], 0)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks")
    lines = [json.dumps({"question": q, "choices": c, "answer": a}) for q, c, a in QUESTIONS]
    (path / "data.jsonl").write_text("\n".join(lines) + "\n")
    (path / "animals.yaml").write_text(CHOICE.format(file=path / "data.jsonl"))
    (path / "write.yaml").write_text(WRITE.format(file=path / "data.jsonl"))
    return path


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="<s>")


def model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.5, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def taken_by_hand(lm, tokenizer) -> list[int]:
    taken = []
    for question, choices, _ in QUESTIONS:
        ids = torch.tensor([tokenizer(question)["input_ids"]])
        logits = lm(ids).logits[0, -1]
        taken.append(int(logits[[WORDS.index(choice) for choice in choices]].argmax()))
    return taken


def test_scores_chance_and_answers_of_both_models(folder, tokenizer, tmp_path):
    student, teacher = model(0), model(1)
    harness = Harness(["animals", "write"], folder=folder, cache=tmp_path / "cache")
    result = run_on_both(harness, student, teacher, tokenizer)
    right = [answer for *_, answer in QUESTIONS]
    shares = []
    for lm in (student, teacher):
        taken = taken_by_hand(lm, tokenizer)
        shares.append(sum(a == b for a, b in zip(taken, right, strict=True)) / 3)
    (score,) = [s for s in result.scores if s.task == "animals"]
    assert (score.value, score.teacher, score.examples) == (*map(pytest.approx, shares), 3)
    assert score.chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
    assert score.relative == pytest.approx((shares[0] - score.chance) / (shares[1] - score.chance))
    choices, written = result.answers
    taken = taken_by_hand(student, tokenizer)
    assert list(choices.letters) == [taken.count(i) for i in range(len(choices.letters))]
    assert sum(choices.right_letters) == sum(choices.letters) == 3
    assert written.task == "write" and 0 <= written.no_end <= 1 and written.mean_length > 0

    calls = []
    teacher.register_forward_pre_hook(lambda *_: calls.append(1))
    again = Harness(["animals", "write"], folder=folder, cache=tmp_path / "cache").run(teacher, tokenizer)
    assert not calls and again[0][0].value == score.teacher  # from the cache
    assert json.dumps(result.to_dict())


def test_relative_scores_need_a_chance():
    student = TaskScore("t", "acc", 10, 0.6, None, 0.25)
    teacher = TaskScore("t", "acc", 10, 0.95, None, 0.25)
    (found,) = relative_scores([student], [teacher])
    assert found.relative == pytest.approx(0.5)
    perplexity = TaskScore("t", "word_perplexity", 10, 20.0, None, None)
    (found,) = relative_scores([perplexity], [perplexity])
    assert found.teacher == 20 and found.relative is None
    assert relative_scores([student], [])[0].teacher is None


def test_generated_answers_without_an_end_are_counted():
    samples = [
        {"resps": [["a b c"]], "arguments": [["q", {"max_gen_toks": 3}]]},
        {"resps": [["a"]], "arguments": [["q", {"max_gen_toks": 3}]]},
    ]
    found = answers_of(samples, "t", "generate_until", lambda text: len(text.split()))
    assert found.no_end == 0.5 and found.mean_length == 3


def test_an_unknown_task_is_refused_with_the_nearest(folder):
    with pytest.raises(UserError, match="no task 'animal'.*animals"):
        Harness(["animal"], folder=folder)
    with pytest.raises(UserError, match="is not a folder"):
        Harness(["animals"], folder=folder / "nothing")
