"""Masks of all that is not plain text, and ids that belong to another tokenizer."""

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rwkvinside.data.encode import Encoder, agreement
from rwkvinside.data.records import document_of
from rwkvinside.data.tokenize import ReadOptions, load_tokens
from rwkvinside.errors import UserError

QUESTION = {"question": "Which?", "choices": ["ä", "b", "c"], "answer": 2}


def encoded(tokenizer, record, **options):
    """(text, what carries loss) of each version of a record."""
    found = list(Encoder(tokenizer, **options)([document_of(record, "text", "a.jsonl:1")]))
    assert all(document.ids.dtype == np.uint32 and len(document.ids) == len(document.loss) for document in found)
    assert len({document.digest for document in found}) == 1  # rotations stay on one side of a validation split
    return [(tokenizer.decode(d.ids), tokenizer.decode(d.ids[d.loss])) for d in found]


def test_a_completion_carries_the_loss(tokenizer, framing):
    assert encoded(tokenizer, {"prompt": "Frage ü:", "completion": " ja"}) == [("Frage ü: ja", " ja")]
    framed = encoded(framing(tokenizer), {"prompt": "Q:", "completion": " ja"})
    assert framed == [("<s>Q: ja</s>", " ja</s>")]


def test_a_token_across_the_border_belongs_to_the_completion():
    bpe = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    assert encoded(tokenizer, {"prompt": "ba", "completion": "ba"}) == [("b ab a", "ab a")]


def test_questions_with_a_chat_template(tokenizer):
    versions = encoded(tokenizer, QUESTION)
    assert [loss for _, loss in versions] == ["C<|im_end|>\n", "B<|im_end|>\n", "A<|im_end|>\n"]
    asked = "Which?\nA. b\nB. c\nC. ä\nAnswer with the letter of the right option."
    assert versions[1][0] == f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n"
    assert encoded(tokenizer, QUESTION, rotate=False) == versions[:1]


def test_questions_without_a_chat_template(make_tokenizer):
    versions = encoded(make_tokenizer(None), QUESTION)
    assert [loss for _, loss in versions] == [" C", " B", " A"]
    assert versions[0][0] == "Which?\nA. ä\nB. b\nC. c\nAnswer: C"


def test_answers_are_counted_as_given_and_as_trained(tokenizer, tmp_path, write_jsonl):
    path = write_jsonl(tmp_path / "q.jsonl", [QUESTION | {"question": f"{i}?"} for i in range(40)])
    store = load_tokens([path], tokenizer, cache_dir=tmp_path / "cache")
    assert store.num_documents == 120
    assert store.facts == {"kind question": 120, "given C": 40, "answer A": 40, "answer B": 40, "answer C": 40}
    train, val = store.split(0.3)
    texts = [{tokenizer.decode(s.piece(i)[0]).split("?")[0] for i in range(s.num_documents)} for s in (train, val)]
    assert not texts[0] & texts[1]  # all rotations of a question are on one side
    unrotated = load_tokens([path], tokenizer, ReadOptions(rotate=False), cache_dir=tmp_path / "cache")
    assert unrotated.num_documents == 40


def test_token_ids_are_taken_as_they_are(tokenizer, framing, tmp_path, write_jsonl):
    ids = tokenizer("some text").input_ids
    path = write_jsonl(tmp_path / "t.jsonl", [{"input_ids": ids, "loss_mask": [0] * 4 + [1] * 5}, {"text": "x"}])
    store = load_tokens([path], framing(tokenizer), cache_dir=tmp_path / "cache")
    assert store.piece(0)[0].tolist() == ids and store.facts == {"kind text": 1, "kind tokens": 1}
    assert store.masked(0).tolist() == [True] * 4 + [False] * 5
    assert store.piece(0)[1].tolist() == [-100] * 3 + ids[4:] + [-100]
    everything = store.without_masks()
    assert everything.piece(0)[1].tolist() == [*ids[1:], -100] and everything.fingerprint != store.fingerprint


def _trained(texts, size):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens([AddedToken("<|end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


@pytest.fixture(scope="module")
def two_tokenizers():
    """Trained on code and on prose about it, with a text that both know."""
    import argparse
    import inspect
    import textwrap

    code = inspect.getsource(argparse)
    prose = [line for line in inspect.getsource(textwrap).splitlines() if "#" in line or '"' in line]
    return _trained([code], 1500), _trained(prose, 900), code


def test_ids_of_another_tokenizer_are_refused(two_tokenizers, tmp_path, write_jsonl):
    own, other, text = two_tokenizers
    pieces = [text[i : i + 2000] for i in range(0, 60_000, 2000)]
    # cut anywhere: what a tokenizer would not do at these borders must not count
    path = write_jsonl(tmp_path / "t.jsonl", [{"input_ids": other(piece).input_ids[3:]} for piece in pieces])
    mine = load_tokens([path], other, cache_dir=tmp_path / "cache")
    assert agreement(mine, other) > 0.99
    with pytest.raises(UserError, match=r"t\.jsonl does not fit the tokenizer .*: of a sample .* \d\d% come"):
        load_tokens([path], own, cache_dir=tmp_path / "cache")
    trusted = load_tokens([path], own, ReadOptions(trust_ids=True), cache_dir=tmp_path / "cache")
    assert trusted.num_documents == 30
    high = write_jsonl(tmp_path / "h.jsonl", [{"input_ids": [len(own)]}])
    with pytest.raises(UserError, match=rf"h\.jsonl holds token id {len(own)}, tokenizer .* has {len(own)} ids"):
        load_tokens([high], own, cache_dir=tmp_path / "cache")
