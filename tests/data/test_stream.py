"""Blocks made while they are read: the order of the source, resumption after a kill, several processes."""

import hashlib
import json
import os
import signal
import time
from multiprocessing import get_context

import numpy as np
import pytest

from rwkvinside.data import encode
from rwkvinside.data.encode import Encoder
from rwkvinside.data.rows import PackedRows
from rwkvinside.data.stream import StreamedRows, TokenStream
from rwkvinside.data.tokenize import load_tokens
from rwkvinside.errors import UserError

COUNT = 3000


@pytest.fixture
def corpus(tmp_path, write_jsonl):
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = [f"story {i} " + "ab" * (i % 30) for i in range(COUNT)]
    for k in range(3):
        write_jsonl(folder / f"part-{k}.jsonl", [{"text": text} for text in texts[k::3]])
    return folder


@pytest.fixture
def open_stream(tmp_path, corpus, tokenizer):
    """Streams of the corpus, or of another source, that are closed at the end."""
    streams = []

    def open_stream(source=corpus, cache="cache", block_tokens=15_000, **options):
        options = {"cache_dir": tmp_path / cache, "block_tokens": block_tokens} | options
        streams.append(TokenStream(str(source), Encoder(tokenizer), **options))
        return streams[-1]

    yield open_stream
    for stream in streams:
        stream.close()


def contents(stream):
    """Ids of all documents in all blocks."""
    found, number = [], 0
    while (block := stream.block(number)) is not None:
        found += [block.piece(i)[0].tolist() for i in range(block.num_documents)]
        number += 1
    return found


@pytest.fixture
def expected(corpus, tokenizer, tmp_path):
    store = load_tokens([corpus], tokenizer, cache_dir=tmp_path / "whole")
    return [store.piece(i)[0].tolist() for i in range(store.num_documents)]


def test_blocks_are_the_source_in_order(open_stream, expected):
    stream = open_stream()
    assert contents(stream) == expected
    assert stream.block(99) is None and stream.block(4).num_tokens >= 15_000
    again = open_stream()
    assert again.fingerprint == stream.fingerprint and contents(again) == expected
    assert open_stream(block_tokens=30_000).fingerprint != stream.fingerprint


def test_only_what_is_needed_is_read(open_stream):
    stream = open_stream(block_tokens=5_000)
    deadline = time.monotonic() + 20
    while len(list(stream.directory.glob("block-??????"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    assert len(list(stream.directory.glob("block-??????"))) == 3  # the first and two ahead


@pytest.mark.parametrize("kind", ["jsonl", "text", "parquet", "saved", "hub"])
def test_every_kind_of_source_goes_on_where_it_stood(kind, open_stream, corpus, tmp_path, expected, monkeypatch):
    """A new stream for each block: each one begins with the cursor that the one before it left."""
    monkeypatch.setattr(encode, "CHUNK_BYTES", 1 << 18)  # long texts, many chunks
    texts = [json.loads(line)["text"] for f in sorted(corpus.iterdir()) for line in f.read_text().splitlines()]
    source = corpus
    if kind == "text":
        source = tmp_path / "corpus.txt"
        source.write_text("\n\n".join(text * 20 for text in texts))
    elif kind != "jsonl":
        import datasets

        data = datasets.Dataset.from_dict({"text": texts})
        source = tmp_path / kind
        if kind == "saved":
            data.save_to_disk(source)
        else:
            source.mkdir()
            for k in range(2):
                data.shard(2, k).to_parquet(source / f"{k}.parquet", batch_size=400)
        source = f"hub:{source}" if kind == "hub" else source
    whole = contents(open_stream(source, cache="straight", block_tokens=15_000))
    assert len(whole) > 50 and (kind == "text" or whole == expected)
    found, number = [], 0
    while True:
        stream = open_stream(source, cache="pieces")
        block = stream.block(number)
        stream.close()
        if block is None:
            break
        found += [block.piece(i)[0].tolist() for i in range(block.num_documents)]
        number += 1
    assert number > 4 and found == whole


def rows_of(stream, seq_len=64, seed=3):
    return StreamedRows(stream, lambda store, seed: PackedRows(store, seq_len, seed), seed)


def test_rows_hold_every_token_once_an_epoch(open_stream, expected):
    rows = rows_of(open_stream())
    rows.row(10**6)  # far after the end: all blocks are known now
    total = rows._starts[-1]
    assert total > sum(map(len, expected)) // 64
    for epoch in range(2):
        found = [rows.row(i) for i in range(epoch * total, (epoch + 1) * total)]
        ids = np.concatenate([row["input_ids"][row["segment_ids"] > 0] for row in found])
        assert sorted(ids.tolist()) == sorted(token for document in expected for token in document)
    first, second = (rows.row(i)["input_ids"].tolist() for i in (0, total))
    assert first != second
    assert rows.tokens_in(total) == pytest.approx(sum(map(len, expected)), rel=0.01)


def test_rows_do_not_depend_on_who_made_the_blocks_or_when(open_stream):
    straight = rows_of(open_stream())
    numbers = range(0, 1500, 7)
    whole = [straight.row(i)["input_ids"].tolist() for i in numbers]
    for i in range(0, 1500, 400):  # a process that is ended every 400 rows
        stream = open_stream(cache="other")
        rows = rows_of(stream)
        assert [rows.row(n)["input_ids"].tolist() for n in numbers if i <= n < i + 400] == [
            ids for n, ids in zip(numbers, whole, strict=True) if i <= n < i + 400
        ]
        stream.close()


def test_validation_documents_are_never_trained_on(open_stream):
    stream = open_stream(val_fraction=0.1)
    val = stream.validation()
    assert 20 < val.num_documents < 200
    held = {tuple(val.piece(i)[0]) for i in range(val.num_documents)}
    number = 0
    while (block := stream.training(number)) is not None:
        assert not held & {tuple(block.piece(i)[0]) for i in range(block.num_documents)}
        assert not block.held_out(0.1).any()
        number += 1
    assert stream.fingerprint != open_stream(val_fraction=0.2).fingerprint


def test_a_damaged_block_is_made_again(open_stream, expected, caplog):
    stream = open_stream()
    assert contents(stream) == expected
    stream.close()
    file = stream.entry(2) / "tokens.bin"
    file.write_bytes(file.read_bytes()[:-5])
    (stream.directory / "end.json").write_text("{")
    assert contents(open_stream()) == expected
    assert "is damaged" in caplog.text


def test_errors_of_the_source_come_where_the_block_is_needed(open_stream, corpus):
    with (corpus / "part-1.jsonl").open("a") as file:
        file.write("{broken\n")
    stream = open_stream(block_tokens=5_000)
    assert stream.block(0).num_tokens
    with pytest.raises(UserError, match=r"part-1\.jsonl:1001: not JSON"):
        contents(stream)
    empty = corpus / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(UserError, match=r"empty\.jsonl is empty"):
        open_stream(empty)
    with pytest.raises(UserError, match="does not exist"):
        open_stream("no/such.jsonl")


def test_a_cache_that_cannot_be_written(open_stream, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written below .*file"):
        open_stream(cache="file/cache")


def test_a_full_disk_is_told_where_the_block_is_needed(open_stream, monkeypatch):
    stream = open_stream(block_tokens=5_000)
    real = np.save

    def full(file, array):
        if "block-000004" in str(file):
            raise OSError(28, "No space left on device")
        real(file, array)

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match="cannot be written below .*No space left") as caught:
        contents(stream)
    assert "free some space" in caught.value.hint
    assert sorted(path.name for path in stream.directory.glob("block*")) == [f"block-{n:06d}" for n in range(4)]


def _print_rows(stream_of, pipe, count):
    rows = rows_of(stream_of())
    for i in range(count):
        pipe.send((i, hashlib.sha256(rows.row(i)["input_ids"].tobytes()).hexdigest()))
    pipe.close()


def test_two_processes_one_of_them_killed(open_stream):
    """Both read the same rows; the one that is killed may have held the lock in the middle of a block."""
    context, count = get_context("fork"), 1800
    pipes, processes = [], []
    for _ in range(2):
        here, there = context.Pipe(duplex=False)
        arguments = (lambda: open_stream(cache="both", block_tokens=5000), there, count)
        processes.append(context.Process(target=_print_rows, args=arguments))
        processes[-1].start()
        there.close()
        pipes.append(here)
    first = [pipes[0].recv() for _ in range(50)]
    os.kill(processes[0].pid, signal.SIGKILL)
    found = [pipes[1].recv() for _ in range(count)]
    for process in processes:
        process.join(timeout=30)
    assert [process.exitcode for process in processes] == [-signal.SIGKILL, 0]
    assert found[:50] == first
    rows = rows_of(open_stream(cache="alone", block_tokens=5000))
    for i in range(0, count, 90):
        assert found[i] == (i, hashlib.sha256(rows.row(i)["input_ids"].tobytes()).hexdigest())
