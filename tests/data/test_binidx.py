"""Megatron's and RWKV's token files, written here byte by byte after their description."""

import struct

import numpy as np
import pytest

from rwkvinside.data.binidx import read_binidx
from rwkvinside.data.rows import PackedRows
from rwkvinside.data.tokenize import ReadOptions, load_tokens
from rwkvinside.errors import UserError

SEQUENCES = [[5, 6, 7], [8], [9, 10, 11, 12], [13, 14]]


def write(path, sequences=SEQUENCES, dtype="<u2", code=8, documents=None, pointers=None, modes=b""):
    """NAME.bin and NAME.idx; returns the index."""
    sizes = [len(s) for s in sequences]
    starts = np.cumsum([0, *sizes])[:-1] * np.dtype(dtype).itemsize
    documents = range(len(sizes) + 1) if documents is None else documents
    parts = [
        b"MMIDIDX\x00\x00",
        struct.pack("<QBQQ", 1, code, len(sizes), len(documents)),
        struct.pack(f"<{len(sizes)}i", *sizes),
        struct.pack(f"<{len(sizes)}q", *(starts if pointers is None else pointers)),
        struct.pack(f"<{len(documents)}q", *documents),
        modes,
    ]
    path.with_suffix(".bin").write_bytes(np.concatenate(sequences).astype(dtype).tobytes())
    path.with_suffix(".idx").write_bytes(b"".join(parts))
    return path.with_suffix(".idx")


def documents_of(source):
    tokens, offsets = read_binidx(source)
    return [tokens[a:b].tolist() for a, b in zip(offsets, offsets[1:], strict=False)]


@pytest.mark.parametrize("dtype, code", [("<u2", 8), ("<i4", 4), ("<i8", 5), ("<u1", 1)])
def test_all_types_of_ids(tmp_path, dtype, code):
    path = write(tmp_path / "a", dtype=dtype, code=code)
    assert documents_of(path) == documents_of(path.with_suffix(".bin")) == documents_of(tmp_path / "a") == SEQUENCES


def test_documents_of_several_sequences_and_none(tmp_path):
    assert documents_of(write(tmp_path / "a", documents=[0, 2, 2, 4])) == [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14]]
    assert documents_of(write(tmp_path / "b", documents=[0])) == SEQUENCES
    assert documents_of(write(tmp_path / "c", documents=[0, 1, 2, 3, 4], modes=b"\0" * 4)) == SEQUENCES
    assert documents_of(write(tmp_path / "d.e", sequences=[[1, 2], [], [3]])) == [[1, 2], [3]]


def test_ids_are_used_where_they_lie(tmp_path, tokenizer):
    texts = [f"document {i} " * (i % 5 + 1) for i in range(300)]
    path = write(tmp_path / "a", [tokenizer(text).input_ids for text in texts])
    cache = tmp_path / "cache"
    store = load_tokens([path], tokenizer, ReadOptions(vocab_size=260), cache_dir=cache)
    assert [tokenizer.decode(store.piece(i)[0]) for i in range(300)] == texts
    assert isinstance(store.tokens, np.memmap) and store.tokens.filename == path.with_suffix(".bin")
    (entry,) = cache.iterdir()
    assert entry.stat().st_size < 10_000  # hashes, no tokens
    stamp = entry.stat().st_mtime_ns
    again = load_tokens([path], tokenizer, cache_dir=cache)
    assert again.fingerprint == store.fingerprint and entry.stat().st_mtime_ns == stamp
    entry.write_bytes(b"damaged")
    assert load_tokens([path], tokenizer, cache_dir=cache).split(0.2)[1].num_documents > 20
    # together with a text, in one pool
    (tmp_path / "t.txt").write_text("some text")
    both = load_tokens([path, tmp_path / "t.txt"], tokenizer, cache_dir=cache)
    assert (both.num_documents, tokenizer.decode(both.piece(300)[0])) == (301, "some text")
    assert PackedRows(both, 64, seed=0).batch(range(20)).num_tokens == 20 * 64
    few = load_tokens([path], tokenizer, ReadOptions(max_tokens=50), cache_dir=cache)
    assert few.num_tokens >= 50 > few.num_tokens - few.lengths[-1]


@pytest.mark.parametrize(
    "damage, match",
    [
        (lambda idx, bin: idx.write_bytes(b""), "not a binidx index"),
        (lambda idx, bin: idx.write_bytes(b"TNTIDX\0\0" + b"\0" * 60), "not a binidx index"),
        (lambda idx, bin: idx.write_bytes(idx.read_bytes()[:40]), "40 bytes, but 4 sequences need"),
        (lambda idx, bin: idx.write_bytes(idx.read_bytes()[:17] + b"\x07" + idx.read_bytes()[18:]), "type 7"),
        (lambda idx, bin: bin.write_bytes(bin.read_bytes()[:-2]), "18 bytes, but the index has 10 tokens"),
        (lambda idx, bin: bin.unlink(), r"a\.bin does not exist"),
        (lambda idx, bin: idx.unlink(), r"a\.idx does not exist"),
        (lambda idx, bin: write(idx, pointers=[0, 6, 6, 16]), "are not contiguous"),
        (lambda idx, bin: write(idx, sequences=[[], []]), "holds no tokens"),
        (lambda idx, bin: write(idx, sequences=[[1, -2]], dtype="<i4", code=4), "token id -2"),
        (lambda idx, bin: write(idx, sequences=[[1, 260]]), "id 260, but the teacher's vocabulary has 260"),
    ],
)
def test_damaged_files(tmp_path, tokenizer, damage, match):
    path = write(tmp_path / "a")
    damage(path, path.with_suffix(".bin"))
    with pytest.raises(UserError, match=match) as caught:
        options = ReadOptions(vocab_size=260)
        load_tokens([path.with_suffix(".bin")], tokenizer, options, cache_dir=tmp_path / "cache")
    assert "\n" not in caught.value.cause + caught.value.hint
