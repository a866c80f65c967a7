"""Packed data: the same documents as the sources, every byte checked once, the tokenizer checked always."""

import json

import numpy as np
import pytest

from rwkvinside.data.encode import tokenizer_hash
from rwkvinside.data.rows import PackedRows
from rwkvinside.data.token_pack import write_pack
from rwkvinside.data.tokenize import load_tokens, pack
from rwkvinside.errors import UserError


@pytest.fixture
def packed(tmp_path, write_jsonl, tokenizer):
    """(sources' own store, directory of the pack)."""
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    a = write_jsonl(tmp_path / "a.jsonl", [{"text": f"story {i}"} for i in range(50)])
    b = write_jsonl(tmp_path / "b.jsonl", [{"messages": chat}, {"input_ids": tokenizer("abc").input_ids}])
    store = load_tokens([a, b], tokenizer, cache_dir=tmp_path / "cache")
    meta = {"tokenizer": tokenizer_hash(tokenizer), "tokenizer_name": "bytes"}
    write_pack(store, tmp_path / "packed", meta)
    return store, tmp_path / "packed"


def open_(path, tokenizer, tmp_path):
    return load_tokens([path], tokenizer, cache_dir=tmp_path / "other")


def test_a_pack_is_its_sources(packed, tokenizer, tmp_path):
    store, path = packed
    again = open_(path, tokenizer, tmp_path)
    assert again.num_documents == store.num_documents == 52 and again.facts == store.facts
    for i in range(52):
        for mine, theirs in zip(store.piece(i), again.piece(i), strict=True):
            assert np.array_equal(mine, theirs)
    assert np.array_equal(again.hashes, store.hashes) and again.fingerprint == store.fingerprint
    rows = PackedRows(again, 16, seed=1).batch(range(5)).labels
    assert rows.equal(PackedRows(store, 16, seed=1).batch(range(5)).labels)
    moved = path.rename(tmp_path / "elsewhere")
    assert open_(moved, tokenizer, tmp_path).fingerprint == store.fingerprint


@pytest.mark.parametrize("name", ["tokens.bin", "loss.bin", "offsets.npy", "hashes.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_a_damaged_pack_is_refused(packed, tokenizer, tmp_path, name, damage):
    file = packed[1] / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-9] ^= 64
    file.write_bytes(content if damage == "flip" else content[:-7])
    if damage == "missing":
        file.unlink()
    nothing = damage == "missing" and name in ("tokens.bin", "meta.json")  # what is left is not a pack
    with pytest.raises(UserError, match="holds no data files" if nothing else "packed data .*is damaged: ") as caught:
        open_(packed[1], tokenizer, tmp_path)
    assert "\n" not in caught.value.cause


def test_every_byte_is_read_once_and_again_when_a_file_changes(packed, tokenizer, tmp_path, monkeypatch):
    _, path = packed
    open_(path, tokenizer, tmp_path)
    read = []
    from rwkvinside.data import token_store as module

    real = module.file_digest
    monkeypatch.setattr(module, "file_digest", lambda file: read.append(file.name) or real(file))
    open_(path, tokenizer, tmp_path)
    assert "tokens.bin" not in read
    tokens = path / "tokens.bin"
    tokens.write_bytes(b"\1" + tokens.read_bytes()[1:])
    with pytest.raises(UserError, match=r"tokens\.bin is not what was written"):
        open_(path, tokenizer, tmp_path)


def test_a_pack_of_another_tokenizer_is_refused(packed, make_tokenizer, tmp_path, write_jsonl):
    other = make_tokenizer()
    other.add_tokens(["story"])
    with pytest.raises(
        UserError, match=r"packed was made with the tokenizer bytes \(SHA-256 [0-9a-f]{12}\), not with"
    ) as caught:
        load_tokens(
            [write_jsonl(tmp_path / "t.jsonl", [{"text": "x"}]), packed[1]], other, cache_dir=tmp_path / "other"
        )
    assert "pack the text again" in caught.value.hint


def test_nothing_half_written_stays(packed, tmp_path, monkeypatch):
    store, _ = packed

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(UserError, match="cannot be written below .*No space left"):
        write_pack(store, tmp_path / "second", {"tokenizer": "x"})
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("second")]


def test_meta_says_what_it_is(packed):
    meta = json.loads((packed[1] / "meta.json").read_text())
    assert meta["documents"] == 52 and meta["tokenizer_name"] == "bytes"
    assert set(meta["sha256"]) == {"tokens.bin", "loss.bin", "offsets.npy", "hashes.npy"}


def test_packing_again_removes_what_a_killed_process_left(tmp_path, write_jsonl, tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    (tmp_path / ".out.0123abcd.unfinished" / "cache").mkdir(parents=True)
    pack([source], tmp_path / "out", tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out"]
