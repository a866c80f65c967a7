"""What is shown of tokenized data, without the command around it."""

import json

import pytest
from tiny import byte_tokenizer

from rwkvinside.data.inspect import samples, source_format, summary
from rwkvinside.data.tokenize import load_tokens


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "a.jsonl"
    records = [{"prompt": f"{i}:", "completion": "ü" * i} for i in range(1, 6)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def store(source, tmp_path):
    return load_tokens([source], byte_tokenizer(), cache_dir=tmp_path / "cache")


def test_samples_are_spread_evenly_and_cut_to_length(store):
    first, middle, last = samples(store, byte_tokenizer(), 3, 6)
    assert [sample.number for sample in (first, middle, last)] == [1, 3, 5]
    assert first.runs == [("1:", True), ("ü", False)]
    assert (first.tokens, first.targets, first.shown) == (4, 2, 4)  # two bytes a letter
    assert (last.tokens, last.targets, last.shown) == (12, 10, 6) and last.runs == [("5:", True), ("üü", False)]
    assert len(list(samples(store, byte_tokenizer(), 99, 6))) == 5
    assert not list(samples(store, byte_tokenizer(), 0, 6))


def test_summary_names_ids_that_the_teacher_has_not(store):
    lines = summary(store, byte_tokenizer(), vocab_size=100, seq_len=8, max_tokens=1000)
    assert lines[0] == "documents   5: 5 completion"
    vocabulary = next(line for line in lines if line.startswith("vocabulary"))
    assert "have ids that the teacher (100) lacks" in vocabulary
    lines = summary(store, byte_tokenizer(), vocab_size=None, seq_len=8, max_tokens=store.num_tokens)
    assert lines[0] == f"documents   5 (the first {store.num_tokens} tokens): 5 completion"
    assert "the tokenizer has 256" in next(line for line in lines if line.startswith("vocabulary"))


def test_formats(source):
    assert source_format(str(source)) == f".jsonl, {source.stat().st_size} bytes"
    assert source_format("hub:some/texts") == "streamed by datasets, split train"
    (source.parent / "b.txt").write_text("text")
    assert source_format(str(source.parent)) == f".jsonl, .txt, 2 files, {source.stat().st_size + 4} bytes"
