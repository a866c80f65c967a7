import gzip
import json
import os

import pyarrow
import pytest

from rwkvinside.data.readers import (
    LARGE_TEXT,
    TEXT_DOCUMENT,
    DocumentReader,
    name_skipped,
    read_documents,
    source_files,
)
from rwkvinside.errors import UserError


def texts(source, **options):
    return [document.text for document in read_documents(source, **options)]


def test_jsonl(tmp_path, write_jsonl):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "one\r\n"}, {"messages": messages}, {"text": " \n"}])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\n \n")
    first, second = read_documents(path)
    assert (first.text, first.where) == ("one\r\n", f"{path}:1")
    assert (second.text, second.messages, second.where) == (None, messages, f"{path}:2")


def test_text_column(tmp_path, write_jsonl):
    path = write_jsonl(tmp_path / "a.jsonl", [{"content": "one", "text": "no"}])
    assert texts(path, text_column="content") == ["one"]


def test_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("eins\r\n\r\nzwei ä\n".encode())
    assert texts(path) == ["eins\n\nzwei ä\n"]


def test_a_large_text_file_is_cut_at_blank_lines_only(tmp_path):
    paragraphs = [f"{i} " + "x" * (i % 7000) for i in range(0, 60000, 101)]
    text = "\n\n".join(paragraphs)
    path = tmp_path / "a.txt"
    path.write_text(text)
    assert path.stat().st_size > LARGE_TEXT
    documents = texts(path)
    assert len(documents) > 20
    assert [p for d in documents for p in d.strip("\n").split("\n\n")] == paragraphs
    assert all(TEXT_DOCUMENT <= len(d) < TEXT_DOCUMENT + 7100 for d in documents[:-1])


def test_parquet_and_directories(tmp_path, write_jsonl):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": pyarrow.array(["p1", "p2"], pyarrow.large_string()), "other": [1, 2]})
    (tmp_path / "sub").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "sub" / "b.parquet")
    (tmp_path / "z.txt").write_text("text")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "README.md").write_text("not data")
    write_jsonl(tmp_path / "a.jsonl", [{"text": "json"}])
    assert texts(tmp_path) == ["json", "p1", "p2", "text"]
    documents = list(read_documents(tmp_path / "sub" / "b.parquet"))
    assert documents[1].where.endswith("b.parquet: row 2")
    with pytest.raises(UserError, match=r"none of 'body', .*'question' among \['other', 'text'\]"):
        texts(tmp_path / "sub" / "b.parquet", text_column="body")
    (tmp_path / "sub" / "b.parquet").write_bytes(b"PAR1 and nonsense")
    with pytest.raises(UserError, match="b.parquet: not a parquet file"):
        texts(tmp_path / "sub")


def test_saved_datasets(tmp_path):
    import datasets

    messages = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]
    datasets.Dataset.from_dict({"messages": messages}).save_to_disk(tmp_path / "chat")
    (document,) = read_documents(tmp_path / "chat")
    assert document.messages == messages[0]
    train = datasets.Dataset.from_dict({"text": ["x", "y"]})
    datasets.DatasetDict(train=train).save_to_disk(tmp_path / "both")
    datasets.DatasetDict(test=train).save_to_disk(tmp_path / "test")
    assert texts(tmp_path / "both") == texts(tmp_path / "test" / "test") == ["x", "y"]
    with pytest.raises(UserError, match=r"no split 'train', only test"):
        texts(tmp_path / "test")


def test_hub_without_network():
    with pytest.raises(UserError, match="hub:no-such-owner/no-such-data") as caught:
        texts("hub:no-such-owner/no-such-data")
    assert "hub:NAME:CONFIG" in caught.value.hint and "\n" not in caught.value.cause


BAD = {
    "empty.jsonl": (b"", r"empty\.jsonl is empty: it holds no documents"),
    "blank.txt": (b" \n\n", r"blank\.txt is empty: it holds no documents"),
    "blanks.jsonl": (b'{"text": " "}\n', r"blanks\.jsonl is empty: it holds no documents"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}\n', r"latin\.jsonl:2: not UTF-8 \(byte 0xe9 at column 11\)"),
    "latin.txt": (b"ok\nok\nna\xefve\n", r"latin\.txt:3: not UTF-8 \(byte 0xef at column 3\)"),
    "utf16.txt": ("text".encode("utf-16"), r"utf16\.txt:1: not UTF-8 \(byte 0xff at column 1\)"),
    "cut.jsonl": (b'{"text": "a"}\n{"text": "b', r"cut\.jsonl:2: not JSON \(Unterminated string"),
    "raw.jsonl": (b'{"text": "a\n', r"raw\.jsonl:1: not JSON \(Invalid control character at column 12\)"),
    "list.jsonl": (b"[1]\n", r"list\.jsonl:1: a list, not an object"),
    "keys.jsonl": (b'{"body": 1}\n', r"keys\.jsonl:1: none of 'text', .* among \['body'\]"),
    "type.jsonl": (b'{"text": 5}\n', r"type\.jsonl:1: 'text' is a int, not a text"),
    "none.jsonl": (b'{"messages": []}\n', r"none\.jsonl:1: 'messages' is not a list with at least one message"),
    "role.jsonl": (b'{"messages": [{"who": "x"}]}\n', r"role\.jsonl:1: a message is \{'who': 'x'\}"),
    "data.csv": (b"a,b\n", r"data\.csv: unknown kind of data file '\.csv'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_file_and_line(tmp_path, name):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        texts(tmp_path / name)
    assert "\n" not in caught.value.cause and "\n" not in caught.value.hint


def test_missing_paths(tmp_path):
    with pytest.raises(UserError, match="'no/such.jsonl' does not exist"):
        texts("no/such.jsonl")
    (tmp_path / "README.md").write_text("x")
    with pytest.raises(UserError, match="holds no data files"):
        texts(tmp_path)


def test_surrogates(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\\ud83d"}\n')
    (document,) = read_documents(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"a\.jsonl:1: the text holds a lone surrogate"):
        document.as_bytes()


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_lines_have_a_longest_length(tmp_path, name):
    file = tmp_path / name
    file.write_text('{"text": "short"}\n' + '{"text": "' + "x" * 88 + '"}\n')  # 101 bytes with its end
    assert list(DocumentReader(file, max_line_bytes=101))
    with pytest.raises(UserError) as caught:
        list(DocumentReader(file, max_line_bytes=100))
    assert caught.value.cause == f"{file}:2: the line has more than 100 bytes"
    assert "data.max_line_bytes" in caught.value.hint


def test_compressed_files_are_read_as_what_they_hold(tmp_path):
    content = "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(50)).encode()
    corpus = ("line\n" * 4000 + "\n").encode() * 3
    (tmp_path / "plain.jsonl").write_bytes(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content[:100]) + gzip.compress(content[100:]))
    (tmp_path / "a.jsonl.zst").write_bytes(pyarrow.compress(content, codec="zstd", asbytes=True))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(corpus))
    expected = [document.text for document in read_documents(tmp_path / "plain.jsonl")]
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        reader = DocumentReader(tmp_path / name)
        texts = [next(iterator).text for iterator in [iter(reader)] for _ in range(20)]
        rest = [document.text for document in DocumentReader(tmp_path / name, cursor=reader.cursor())]
        assert texts + rest == expected, name
    assert len(list(read_documents(tmp_path / "c.txt.gz"))) == 3
    assert [file.name for file in source_files(tmp_path)] == ["a.jsonl.gz", "a.jsonl.zst", "c.txt.gz", "plain.jsonl"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_damaged_compressed_files(tmp_path, name):
    content = json.dumps({"text": "x" * 1000}).encode() + b"\n"
    packed = gzip.compress(content) if name.endswith("gz") else pyarrow.compress(content, codec="zstd", asbytes=True)
    for broken in (packed[:-9], b"nothing packed"):
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(UserError, match=name):
            list(read_documents(tmp_path / name))


def test_links_are_followed_and_what_is_skipped_is_named(tmp_path, caplog):
    folder, other = tmp_path / "data", tmp_path / "other"
    other.mkdir()
    (other / "b.jsonl").write_text('{"text": "b"}\n')
    (folder / "sub").mkdir(parents=True)
    (folder / "a.jsonl").write_text('{"text": "a"}\n')
    (folder / "notes.csv").write_text("x")
    (folder / "linked").symlink_to(other)
    (folder / "sub" / "round").symlink_to(folder)  # in circles
    assert [document.text for document in read_documents(folder)] == ["a", "b"]
    name_skipped(folder)
    assert "notes.csv" in caplog.text
    (folder / "gone.jsonl").symlink_to(tmp_path / "nothing.jsonl")
    with pytest.raises(UserError, match=r"gone\.jsonl' is a link to .*nothing\.jsonl, which does not exist"):
        list(read_documents(folder))


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for source in (tmp_path / "pipe.jsonl", tmp_path):
        with pytest.raises(UserError, match=r"pipe\.jsonl' is a pipe or a device"):
            list(read_documents(source))
    for source in ("", "  "):
        with pytest.raises(UserError, match="named by an empty text"):
            source_files(source)


def test_numbers_that_are_too_long(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "id": ' + "9" * 5000 + "}\n")
    with pytest.raises(UserError, match=r"a\.jsonl:1: not JSON \(a number of more than 4,300 digits\)"):
        list(read_documents(tmp_path / "a.jsonl"))
