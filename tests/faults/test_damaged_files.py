"""Every file that this package writes and reads again, damaged in five ways: refused, made again, or harmless.

Never may other content come out, and never anything but a `UserError`, which commands turn into one line and exit code
2 or 3. Checkpoints of runs have tests of their own.
"""

import json
import logging
import shutil
import struct

import numpy as np
import pytest
import torch
from finished_run import save_run, save_teacher
from tiny import byte_tokenizer

from rwkvinside.data.batch import Batch
from rwkvinside.data.encode import Encoder
from rwkvinside.data.stream import TokenStream
from rwkvinside.data.tokenize import load_tokens, pack
from rwkvinside.errors import UserError, VerificationError
from rwkvinside.export import verify as export_verify
from rwkvinside.export.huggingface import export_hf
from rwkvinside.teacher.logits_store import LogitsReader, LogitsWriter, row_digests

pytestmark = pytest.mark.faults("damaged files")

TEXT = b"The quick brown fox jumps over the lazy dog.\n"


def truncated(content):
    return content[: len(content) // 2]


def extended(content):
    return content + b"\0"


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]


def emptied(content):
    return b""


def replaced(content):
    return (TEXT * (len(content) // len(TEXT) + 1))[: len(content)]


def damages():
    return pytest.mark.parametrize("damage", [truncated, extended, flipped, emptied, replaced])


def files(*names):
    """Parametrize over names of files, which the test compares with what is there."""
    return pytest.mark.parametrize("name", names)


def spoil(file, damage):
    content = file.read_bytes()
    file.write_bytes(damage(content))
    assert file.read_bytes() != content


def contents(store):
    """All that training takes from a store."""
    pieces = [store.piece(i) for i in range(store.num_documents)]
    return (
        [[part.tolist() for part in piece] for piece in pieces],
        store.hashes.tolist(),
        store.max_id,
        dict(store.facts),
    )


def outcome(use, file, expected, caplog):
    """How a damaged file is met: "refused" in a line that names it, "made again" as it was, or "harmless"."""
    caplog.clear()
    refusal = None
    try:
        found = use()
    except UserError as error:
        refusal = error
    if refusal is not None:
        assert "\n" not in refusal.cause and refusal.hint and refusal.exit_code in (2, 3)
        assert file.name in refusal.cause or file.parent.name in refusal.cause, refusal.cause
        return "refused"
    assert found == expected
    said = [record for record in caplog.records if record.levelno >= logging.WARNING and "damaged" in record.message]
    return "made again" if said else "harmless"


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer("<eos>", eos_token="<eos>")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    records = [{"text": f"story {i} " + "ab" * (i % 30)} for i in range(40)]
    records += [{"prompt": "two and two", "completion": " is four"}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


STORE = ("tokens.bin", "loss.bin", "offsets.npy", "hashes.npy", "meta.json")


@pytest.fixture(scope="module")
def cache(corpus, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("cache")
    return path, contents(load_tokens([corpus], tokenizer, cache_dir=path))


@damages()
@files(*STORE)
def test_a_token_cache(cache, corpus, tokenizer, tmp_path, name, damage, caplog):
    copy = shutil.copytree(cache[0], tmp_path / "cache")
    (entry,) = copy.iterdir()
    assert {file.name for file in entry.iterdir()} == set(STORE)
    spoil(entry / name, damage)
    found = outcome(lambda: contents(load_tokens([corpus], tokenizer, cache_dir=copy)), entry / name, cache[1], caplog)
    large_of_same_size = name.endswith(".bin") and damage in (flipped, replaced)
    assert found == ("refused" if large_of_same_size else "made again")


@pytest.fixture(scope="module")
def packed(corpus, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "pack"
    return path, contents(pack([corpus], path, tokenizer))


@damages()
@files(*STORE)
@pytest.mark.parametrize("known", [False, True], ids=["new", "used before"])
def test_packed_data(packed, tokenizer, tmp_path, name, damage, known, caplog):
    copy = shutil.copytree(packed[0], tmp_path / "pack")
    assert {file.name for file in copy.iterdir()} == set(STORE)

    def use():
        return contents(load_tokens([copy], tokenizer, cache_dir=tmp_path / "cache"))

    if known:
        assert use() == packed[1]
    spoil(copy / name, damage)
    assert outcome(use, copy / name, packed[1], caplog) == "refused"


@damages()
def test_hashes_of_binidx_data(tokenizer, tmp_path, damage, caplog):
    ids = np.arange(60, dtype=np.uint16) % 50 + 30
    (tmp_path / "b.bin").write_bytes(ids.tobytes())
    sizes = [20, 25, 15]
    ends = np.cumsum([0, *sizes])
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 3, 4)
    numbers = (np.array(sizes, np.int32), (2 * ends[:-1]).astype(np.int64), np.arange(4, dtype=np.int64))
    (tmp_path / "b.idx").write_bytes(header + b"".join(array.tobytes() for array in numbers))

    def use():
        return contents(load_tokens([tmp_path / "b.idx"], tokenizer, cache_dir=tmp_path / "cache"))

    expected = use()
    (file,) = (tmp_path / "cache").iterdir()
    spoil(file, damage)
    assert outcome(use, file, expected, caplog) == "made again"


@pytest.fixture(scope="module")
def streamed(corpus, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("stream")
    return path, read_stream(corpus, tokenizer, path)


def read_stream(corpus, tokenizer, cache):
    stream = TokenStream(str(corpus), Encoder(tokenizer), cache_dir=cache, block_tokens=1000)
    try:
        found, number = [], 0
        while (block := stream.block(number)) is not None:
            found.append(contents(block))
            number += 1
        return found
    finally:
        stream.close()


@damages()
@files("end.json", "lock", *(f"block-000000/{name}" for name in STORE))
def test_a_stream(streamed, corpus, tokenizer, tmp_path, name, damage, caplog):
    copy = shutil.copytree(streamed[0], tmp_path / "cache")
    (folder,) = copy.iterdir()
    blocks = [f"block-{i:06d}/{name}" for i in range(len(streamed[1])) for name in STORE]
    assert {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} == {
        "end.json",
        "lock",
        *blocks,
    }
    if name == "lock" and damage is not extended:  # it is empty
        return
    spoil(folder / name, damage)
    found = outcome(lambda: read_stream(corpus, tokenizer, copy), folder / name, streamed[1], caplog)
    if name in ("lock", "end.json"):  # nobody reads the one; without the other the end of the source is found again
        assert found == "harmless"
    else:
        assert found == ("refused" if name.endswith(".bin") and damage in (flipped, replaced) else "made again")


@pytest.fixture(scope="module")
def logits(tmp_path_factory):
    """Four rows of five positions in two shards, and batches of them."""
    path, generator = tmp_path_factory.mktemp("logits") / "logits", torch.Generator().manual_seed(0)
    ids = torch.randint(3, 50, (4, 6), generator=generator)
    labels = torch.cat([ids[:, 1:], torch.full((4, 1), -100)], 1)
    positions, segments = torch.arange(6).repeat(4, 1), torch.ones(4, 6, dtype=torch.int32)
    batch = Batch(ids, labels, positions, segments, rows=(0, 1, 2, 3))
    writer = LogitsWriter(path, {"seed": 0}, k=3, vocab=64, rows=4, rows_per_shard=2)
    for rows in writer.missing():
        values = torch.randn(10, 4, generator=generator).log_softmax(-1)
        top = torch.randint(64, (10, 3), generator=generator)
        writer.write(rows, top, values, torch.tensor([5, 5]), row_digests(batch)[rows.start : rows.stop])
    return path, batch, read_logits(path, batch)


def read_logits(path, batch):
    reader = LogitsReader(path)
    reader.require(4)
    return [part.tolist() for part in reader.batch(batch)], reader.k, reader.vocab, reader.identity


@damages()
@files("index.json", "logits-00000.safetensors", "logits-00001.safetensors")
def test_logits_on_disk(logits, tmp_path, name, damage, caplog):
    copy = shutil.copytree(logits[0], tmp_path / "logits")
    assert {file.name for file in copy.iterdir()} == {
        "index.json",
        "logits-00000.safetensors",
        "logits-00001.safetensors",
    }
    spoil(copy / name, damage)
    assert outcome(lambda: read_logits(copy, logits[1]), copy / name, logits[2], caplog) == "refused"
    if name != "index.json":  # the same command writes it again
        writer = LogitsWriter(copy, {"seed": 0}, k=3, vocab=64, rows=4, rows_per_shard=2)
        assert [rows.start for rows in writer.missing()] == [2 * int(name[-len("0.safetensors")])]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root = tmp_path_factory.mktemp("export")
    teacher = save_teacher(root / "teacher", vocab_size=259)
    byte_tokenizer("<s>", "</s>", "<pad>", chat_template="{{ messages }}").save_pretrained(teacher)
    (teacher / "LICENSE").write_text("the licence")
    (teacher / "additional_chat_templates").mkdir()
    (teacher / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    export_hf(save_run(root / "run", teacher), root / "student", max_shard_size="40KB")
    return root / "student", root / "run"


@damages()
def test_an_export(exported, tmp_path, damage, monkeypatch, record_property):
    """Each of its files; nothing of it is loaded."""
    out, run = exported
    monkeypatch.setattr(export_verify, "compare", lambda *_: pytest.fail("damage was not seen"))
    names = sorted(file.relative_to(out) for file in out.rglob("*") if file.is_file())
    record_property("tried", len(names))
    assert len(names) > 20 and len({name.suffix for name in names}) >= 6
    for name in names:
        copy = tmp_path / "copy"
        shutil.copytree(out, copy)
        spoil(copy / name, damage)
        with pytest.raises(VerificationError) as caught:
            export_verify.verify(copy, against=run)
        assert name.name in caught.value.cause and "\n" not in caught.value.cause
        shutil.rmtree(copy)
