"""Recall, judged by models whose answers are known: one that copies what followed, and one that knows nothing."""

from types import SimpleNamespace

import pytest
import torch

from rwkvinside.errors import UserError
from rwkvinside.evaluate.recall import (
    PairFrame,
    RecallPlan,
    chance,
    number_texts,
    pair_texts,
    recall,
    recall_texts,
    word_ids,
)

WORDS = list(range(10, 310))
FRAME = PairFrame((1,), (2,), (3,))
PLAN = RecallPlan(lengths=(64, 200), depths=5, samples=6)


class Letters:
    """A tokenizer with one token for each character."""

    bos_token_id, all_special_ids, added_tokens_decoder = 1, [1], {}

    def __len__(self):
        return 128

    def __call__(self, text, **options):
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, ids):
        return "".join(map(chr, ids))


def copies(ids, count, order=1, vocab=400):
    """What followed the last occurrence of the same `order` tokens, for all but the last occurrence itself."""
    logits = torch.zeros(*ids.shape, vocab)
    for row, tokens in enumerate(ids.tolist()):
        seen = {}
        for t in range(order - 1, len(tokens)):
            key = tuple(tokens[t - order + 1 : t + 1])
            if key in seen:
                logits[row, t, seen[key]] = 1
            if t + 1 < len(tokens):
                seen[key] = tokens[t + 1]
    return logits[:, -count:]


def copies_pairs(ids, count):
    return copies(ids, count, order=2)


def knows_nothing(ids, count, vocab=400):
    generator = torch.Generator().manual_seed(int(ids.sum()))
    return torch.rand(*ids.shape, vocab, generator=generator)[:, -count:]


def mean(scores, name):
    return sum(getattr(s, name) * s.answers for s in scores) / sum(s.answers for s in scores)


def test_pairs_are_all_found_by_copying_and_at_chance_by_guessing():
    texts = pair_texts(WORDS, FRAME, PLAN)
    assert {len(text.ids) for text in texts} == {64, 200}
    found = recall(copies_pairs, "pairs", texts)
    assert {(s.length, s.depth) for s in found} == {(n, d) for n in (64, 200) for d in (0, 0.25, 0.5, 0.75, 1)}
    assert mean(found, "exact") == mean(found, "chosen") == 1

    texts = pair_texts(WORDS, FRAME, RecallPlan((64,), samples=64))
    guess = chance("pairs", texts)
    assert guess == pytest.approx(1 / 7)  # of 63 tokens, 8 for each pair
    guessed = recall(knows_nothing, "pairs", texts)
    answers = sum(s.answers for s in guessed)
    assert abs(mean(guessed, "chosen") - guess) < 4 * (guess * (1 - guess) / answers) ** 0.5
    assert mean(guessed, "exact") < 0.02


def test_a_model_that_reads_the_last_tokens_only_finds_what_is_near():
    texts = pair_texts(WORDS, FRAME, RecallPlan((600,), samples=12))

    def near(ids, count, reach=200):
        cut = torch.where(torch.arange(ids.shape[1]) >= ids.shape[1] - reach, ids, 0)
        return copies(cut, count, order=2)

    found = {s.depth: s.exact for s in recall(near, "pairs", texts)}
    assert found[0] == 0 and found[1] == 1


@pytest.mark.parametrize("task", ["passkey", "needle"])
def test_numbers_are_found_by_copying_after_equal_words(task):
    haystack = [ord(c) for c in "Some document. Another one, without any number. "] if task == "needle" else None
    texts = number_texts(Letters(), task, RecallPlan((320,), samples=3), haystack)
    assert {len(text.ids) for text in texts} == {320}
    for text in texts:
        (answer,) = text.answers
        written = Letters().decode(text.ids)
        number = written[answer.start :].strip()
        assert number.isdigit() and written.count(number) == 3  # twice in the needle, and the answer
        place = written.index(number) / 320
        assert abs(place - answer.depth) < 0.5
    found = recall(lambda ids, count: copies(ids, count, order=10), task, texts)
    assert len(found) == 5 and mean(found, "exact") == 1 and found[0].chosen is None
    assert mean(recall(knows_nothing, task, texts), "exact") == 0


def test_texts_are_the_same_for_the_same_seed_and_need_room():
    assert pair_texts(WORDS, FRAME, PLAN) == pair_texts(WORDS, FRAME, PLAN)
    assert pair_texts(WORDS, FRAME, PLAN) != pair_texts(WORDS, FRAME, RecallPlan((64, 200), seed=1))
    assert list(recall_texts(Letters(), RecallPlan((320,)), None)) == ["passkey", "pairs"]
    with pytest.raises(UserError, match="100 tokens have no room for the passkey task"):
        number_texts(Letters(), "passkey", RecallPlan((100,)))
    with pytest.raises(UserError, match="no room for two pairs"):
        pair_texts(WORDS, FRAME, RecallPlan((7,)))


def test_words_are_words_where_the_vocabulary_has_enough():
    names = ["<s>", *(f" word{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(200)), *map(str, range(500))]
    tokenizer = SimpleNamespace(
        all_special_ids=[0], added_tokens_decoder={}, decode=lambda ids: names[ids[0]], __len__=lambda: 0
    )

    class Tokenizer(SimpleNamespace):
        def __len__(self):
            return len(names)

    ids = word_ids(Tokenizer(**vars(tokenizer)))
    assert ids and all(names[i].startswith(" word") for i in ids)
    assert len(word_ids(Letters())) > 100  # characters: all but the special one
