import os

import pytest

from rwkvinside.data.readers import LARGE_TEXT, TEXT_DOCUMENT, DocumentReader, read_documents
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


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", ["pipe", "broken link"])
def test_what_is_not_a_file_is_refused_without_waiting(tmp_path, inside, kind):
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "a.jsonl"
    (tmp_path / "data" / "b.jsonl").write_text('{"text": "x"}\n')
    os.mkfifo(file) if kind == "pipe" else file.symlink_to(tmp_path / "nowhere")
    said = "not a regular file, but a pipe" if inside or kind == "pipe" else "does not exist"
    with pytest.raises(UserError, match=said):
        list(read_documents(file.parent if inside else file))
