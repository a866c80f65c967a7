"""The demo's text: what is skipped, where it is cut, and that no source file is on both sides of the split."""

import json

import pytest

from rwkvinside.data.readers import read_documents
from rwkvinside.demo.corpus import MAX_PIECE_CHARACTERS, MIN_PIECE_CHARACTERS, Corpus, collect, pieces
from rwkvinside.errors import UserError

SOURCES = [f"source{i:02}" for i in range(30)]
PARAGRAPH = "x = 1  # a line of code\n" * 20 + "\n"


@pytest.fixture
def library(tmp_path):
    root = tmp_path / "lib"
    (root / "package").mkdir(parents=True)
    for name in SOURCES:
        (root / "package" / f"{name}.py").write_text(f"name = '{name}'\n" + PARAGRAPH * 5)
    (root / "test").mkdir()
    (root / "test" / "test_it.py").write_text("never = 'tests'\n" + PARAGRAPH)
    (root / "latin.py").write_bytes(b"# coding: latin-1\nnever = '\xe9'\n" + PARAGRAPH.encode())
    (root / "table.py").write_text("never = [\n" + "    'table',\n" * MAX_PIECE_CHARACTERS + "]\n")
    (root / "tiny.py").write_text("never = 1\n")
    (root / "notes.txt").write_text("never: not Python\n" + PARAGRAPH)
    (root / "pydoc_data").mkdir()
    (root / "pydoc_data" / "topics.py").write_text(f"topics = {{'assert': {'The page of assert. ' * 20!r}}}\n")
    return root


def collect_small(library) -> Corpus:
    return collect(library, val_every=4, min_characters=60_000)


def test_collects_sources_and_manual_pages_and_nothing_else(library):
    corpus = collect_small(library)
    text = "".join(corpus.train + corpus.val)
    assert "never" not in text
    assert "source00" in text and "source29" in text
    assert "The page of assert." in text and "topics =" not in text
    assert all(len(d) >= MIN_PIECE_CHARACTERS for d in corpus.train + corpus.val)


def test_no_source_file_is_on_both_sides(library):
    corpus = collect_small(library)
    train, val = ({name for name in SOURCES if name in "".join(side)} for side in (corpus.train, corpus.val))
    assert train and val and not train & val


def test_the_split_does_not_move_when_files_are_added(library):
    before = collect_small(library)
    (library / "added.py").write_text("added = True\n" + PARAGRAPH)
    after = collect_small(library)
    assert set(before.val) <= set(after.val) and set(before.train) <= set(after.train)
    assert before.digest != after.digest
    (library / "added.py").unlink()
    assert before.digest == collect_small(library).digest


def test_pieces_are_cut_at_blank_lines_and_lose_no_line():
    text = PARAGRAPH * 20
    found = list(pieces(text, size=1000))
    assert all(1000 <= len(piece) < 1000 + len(PARAGRAPH) for piece in found[:-1])
    assert "".join(found).replace("\n", "") == text.replace("\n", "")
    assert all(piece.startswith("x = 1") and piece.endswith("code\n") for piece in found)


def test_a_python_without_sources_is_refused(tmp_path):
    (tmp_path / "a.py").write_text(PARAGRAPH)
    with pytest.raises(UserError, match="characters of Python source"):
        collect(tmp_path)


def test_the_written_files_are_what_data_reads(tmp_path):
    train, val = Corpus(["one\n\ttwo é"], ["three"]).write(tmp_path / "text")
    assert [document.text for document in read_documents(train)] == ["one\n\ttwo é"]
    assert json.loads(val.read_text()) == {"text": "three"}
    assert sorted(path.name for path in train.parent.iterdir()) == ["train.jsonl", "val.jsonl"]


def test_this_machine_has_enough():
    corpus = collect()
    assert sum(map(len, corpus.train)) > 2_000_000
    assert 20 <= len(corpus.val) < len(corpus.train) / 5
