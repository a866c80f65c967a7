import hashlib
import json
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
from transformers import AutoTokenizer

from rwkvinside.data.encode import tokenizer_hash
from rwkvinside.data.rows import PackedRows, PaddedDocuments
from rwkvinside.data.tokenize import ReadOptions, load_tokens
from rwkvinside.errors import UserError
from rwkvinside.support.scratch import scratch


@pytest.fixture
def corpus(tmp_path, write_jsonl):
    return write_jsonl(tmp_path / "a.jsonl", [{"text": f"story {i} " + "ab" * (i % 30)} for i in range(1200)])


@pytest.fixture
def load(tmp_path, tokenizer):
    """load_tokens into tmp_path/cache; `load.calls` counts calls of the progress callback."""

    def load(*sources, tokenizer=tokenizer, **options):
        def progress(documents, tokens):
            load.calls.append((documents, tokens))

        return load_tokens(sources, tokenizer, ReadOptions(**options), cache_dir=tmp_path / "cache", progress=progress)

    load.calls = []
    return load


def document(store, i):
    return store.piece(i)[0].tolist()


def test_tokens_are_those_of_the_tokenizer(load, corpus, tokenizer):
    store = load(corpus)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    assert store.num_documents == len(texts) == 1200
    assert [document(store, i) for i in range(1200)] == [tokenizer(text).input_ids for text in texts]
    assert store.num_tokens == store.lengths.sum() == len(store.tokens)
    assert store.loss is None
    assert load.calls[-1] == (1200, store.num_tokens) and len(load.calls) == 3
    ids, labels = store.piece(7, 2, 5)
    whole = document(store, 7)
    assert (ids.tolist(), labels.tolist()) == (whole[2:5], whole[3:6])
    assert store.piece(7)[1].tolist() == [*whole[1:], -100]


def test_a_second_run_reads_nothing(load, corpus, tmp_path):
    first = load(corpus)
    (entry,) = (tmp_path / "cache").iterdir()
    times = {file.name: file.stat().st_mtime_ns for file in entry.iterdir()}
    load.calls.clear()
    again = load(corpus)
    assert not load.calls
    assert {file.name: file.stat().st_mtime_ns for file in entry.iterdir()} == times
    assert again.fingerprint == first.fingerprint and np.array_equal(again.tokens, first.tokens)


def test_what_makes_a_new_entry(load, corpus, tmp_path, write_jsonl, tokenizer, make_tokenizer, framing):
    other = make_tokenizer()
    other.add_tokens(["story"])
    second = write_jsonl(tmp_path / "b.jsonl", [{"text": "more"}])
    seen = {load(corpus).fingerprint}
    changes = [
        lambda: load(corpus, tokenizer=other),
        lambda: load(corpus, tokenizer=make_tokenizer("{{ messages }}")),
        lambda: load(corpus, tokenizer=framing(make_tokenizer())),
        lambda: load(corpus, rotate=False),
        lambda: load(corpus, max_tokens=100),
        lambda: load(second),
    ]
    for change in changes:
        load.calls.clear()
        store = change()
        assert load.calls and store.fingerprint not in seen
        seen.add(store.fingerprint)
    load.calls.clear()
    both = [load(corpus, second), load(second, corpus)]  # each source has its own entry
    assert not load.calls and len({store.fingerprint for store in both} - seen) == 2
    assert [store.num_documents for store in both] == [1201, 1201]
    assert document(both[0], 1200) == document(both[1], 0) == tokenizer("more").input_ids
    stat = corpus.stat()
    os.utime(corpus, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert load(corpus).fingerprint not in seen
    with corpus.open("a") as file:
        file.write('{"text": "one more"}\n')
    assert load(corpus).num_documents == 1201


def test_padding_left_on_by_a_call_is_not_another_tokenizer(tokenizer):
    tokenizer.pad_token = "</s>"
    first = tokenizer_hash(tokenizer)
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(tokenizer) == first


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy", "hashes.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_entry_is_made_again(load, corpus, tmp_path, caplog, name, damage):
    tokens = np.array(load(corpus).tokens)
    (file,) = (tmp_path / "cache").glob(f"*/{name}")
    file.write_bytes(file.read_bytes()[:-7]) if damage == "cut" else file.unlink()
    load.calls.clear()
    assert np.array_equal(load(corpus).tokens, tokens) and load.calls
    assert "is damaged" in caplog.text


def test_a_damaged_block_is_refused_where_it_is_used(load, tmp_path, write_jsonl, monkeypatch):
    monkeypatch.setattr("rwkvinside.data.checked_array.BLOCK", 1000)
    corpus = write_jsonl(
        tmp_path / "a.jsonl", [{"text": "x" * 24}] * 100 + [{"prompt": "a" * 20, "completion": "b" * 5}]
    )
    load(corpus)
    (entry,) = (tmp_path / "cache").iterdir()
    for name, position in (("tokens.bin", 5500), ("loss.bin", 2410)):
        content = (entry / name).read_bytes()
        (entry / name).write_bytes(content[:position] + bytes([content[position] ^ 8]) + content[position + 1 :])
        store = load(corpus)
        assert len(store.piece(0)[0]) == 24, "blocks that are as written are used"
        with pytest.raises(UserError) as caught:
            [store.piece(i) for i in range(store.num_documents)]
        begin = position // 1000 * 1000
        assert caught.value.cause.startswith(f"{entry / name} is damaged between its bytes {begin:,} and")
        assert caught.value.hint == f"remove {entry}: it is made again when you start again"
        (entry / name).write_bytes(content)
    store = load(corpus)
    assert [len(store.piece(i)[0]) for i in range(101)] == [24] * 100 + [25]


def test_what_a_killed_process_left_is_removed(load, corpus, tmp_path):
    """By the next one that does the same; what a living process is writing stays."""
    load(corpus)
    (entry,) = (tmp_path / "cache").iterdir()
    shutil.rmtree(entry)
    dead = entry.with_name(f".{entry.name}.0123abcd.unfinished")
    (dead / entry.name).mkdir(parents=True)
    with scratch(entry) as living:
        load(corpus)
        assert living.exists() and not dead.exists()
    assert list((tmp_path / "cache").iterdir()) == [entry]


def test_a_failure_leaves_nothing_behind(load, corpus, tmp_path):
    with corpus.open("a") as file:
        file.write("{broken\n")
    with pytest.raises(UserError, match=r"a\.jsonl:1201: not JSON"):
        load(corpus)
    assert list((tmp_path / "cache").iterdir()) == []


def _load_in_process(args):
    path, cache, tokenizer = args
    return load_tokens([path], tokenizer, cache_dir=cache).fingerprint


def test_processes_may_fill_one_cache_at_once(corpus, tmp_path, tokenizer):
    with ProcessPoolExecutor(3, mp_context=get_context("fork")) as pool:
        results = set(pool.map(_load_in_process, [(corpus, tmp_path / "cache", tokenizer)] * 3))
    assert len(results) == 1 and [p.name for p in (tmp_path / "cache").iterdir()] == list(results)


def test_a_cache_that_cannot_be_written(tmp_path, corpus, tokenizer):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="tokens cannot be written below .*file/cache'") as caught:
        load_tokens([corpus], tokenizer, cache_dir=tmp_path / "file" / "cache")
    assert "data.cache_dir" in caught.value.hint


def test_the_vocabulary_of_the_teacher(load, corpus, tmp_path, write_jsonl, tokenizer):
    high = write_jsonl(tmp_path / "b.jsonl", [{"text": "a"}, {"text": "<|im_end|>"}])
    with pytest.raises(UserError, match="has token id 259, but the teacher's vocabulary has 259 entries"):
        load(high, vocab_size=259)
    load(high, vocab_size=260)
    with pytest.raises(UserError, match="has token id 259, but the teacher's vocabulary has 259 entries"):
        load(high, vocab_size=259)  # from the cache


def test_max_tokens_stops_after_a_whole_document(load, corpus):
    everything, part = load(corpus), load(corpus, max_tokens=1000)
    assert part.num_tokens >= 1000 > part.num_tokens - part.lengths[-1]
    assert np.array_equal(part.tokens, everything.tokens[: part.num_tokens])


def test_a_text_is_framed_once_as_its_tokenizer_frames_texts(load, framing, tmp_path, write_jsonl, tokenizer):
    path = write_jsonl(tmp_path / "b.jsonl", [{"text": "ab"}, {"text": "<s>ab"}, {"text": "ab</s>"}])
    a, b, bos, eos = tokenizer("ab<s></s>").input_ids
    plain = load(path)
    assert [document(plain, i) for i in range(3)] == [[a, b], [bos, a, b], [a, b, eos]]
    framed = load(path, tokenizer=framing(tokenizer))
    assert [document(framed, i) for i in range(3)] == [[bos, a, b, eos]] * 3


def test_conversations_carry_their_loss_mask(load, tmp_path, write_jsonl, tokenizer):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path = write_jsonl(tmp_path / "b.jsonl", [{"text": "xyz"}, {"messages": messages}])
    store = load(path)
    ids, labels = store.piece(1)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(labels[labels >= 0]) == "ho<|im_end|>\n"
    assert tokenizer.decode(ids[labels >= 0]) == "\nho<|im_end|>"
    assert store.piece(0)[1].tolist() == [*store.piece(0)[0][1:], -100]
    assert PaddedDocuments(store, 512).batch([0, 1]).num_targets == 2 + 4
    load.calls.clear()
    assert np.array_equal(load(path).piece(1)[1], labels) and not load.calls


def test_split_is_by_content_and_stays_when_documents_are_added(load, corpus, tmp_path, write_jsonl):
    train, val = load(corpus).split(0.1)
    assert 80 < val.num_documents < 160 and train.num_documents + val.num_documents == 1200
    digests = [
        int.from_bytes(hashlib.blake2b(json.loads(line)["text"].encode(), digest_size=8).digest(), "little")
        for line in corpus.read_text().splitlines()
    ]
    assert val.selected.tolist() == [i for i, digest in enumerate(digests) if digest < 0.1 * 2**64]
    more = write_jsonl(tmp_path / "b.jsonl", [{"text": f"other {i}"} for i in range(300)] + [{"text": "story 0 "}] * 3)
    train2, val2 = load(corpus, more).split(0.1)
    assert val2.selected[val2.selected < 1200].tolist() == val.selected.tolist()
    copies = {1500, 1501, 1502}
    assert copies <= set((val2 if 0 in val.selected else train2).selected.tolist())
    assert len({train.fingerprint, val.fingerprint, train2.fingerprint, val2.fingerprint}) == 4
    assert document(val, 3) == document(load(corpus), val.selected[3])
    assert load(corpus).split(0)[1] is None


def test_a_split_with_an_empty_side_is_refused(load, tmp_path, write_jsonl):
    store = load(write_jsonl(tmp_path / "b.jsonl", [{"text": "a"}, {"text": "b"}]))
    with pytest.raises(UserError, match="split of 1e-06 takes 0 of 2 documents") as caught:
        store.split(1e-6)
    assert "--val" in caught.value.hint
    with pytest.raises(UserError, match="split of 1 takes 2 of 2 documents"):
        store.split(1.0)


def test_stories_begin_with_bos_and_have_no_eos(shared, tmp_path):
    """What the published teacher was trained on: <s> = 1 in front of every story, </s> = 2 nowhere.

    Its probability of </s> at the end of a story is 1e-12, that of <s> up to 0.9, so </s> must not be a target.
    """
    tokenizer = AutoTokenizer.from_pretrained(shared / "teachers" / "stories260k")
    path = shared / "data" / "tinystories-260k-samples" / "val.jsonl"
    store = load_tokens([path], tokenizer, ReadOptions(vocab_size=512), cache_dir=tmp_path / "cache")
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert store.num_documents == len(texts) == 300
    for i, text in enumerate(texts):
        ids = store.piece(i)[0]
        assert ids[0] == 1 and not np.isin(ids[1:], [1, 2]).any()
        assert tokenizer.decode(ids[1:]) == text
    packed = PackedRows(store, 256, seed=0)
    whole = packed.batch(range(packed.rows_per_epoch))
    assert whole.num_tokens == store.num_tokens
    assert whole.num_targets == store.num_tokens - 300
