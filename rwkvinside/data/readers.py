"""From a file, a directory or a hub name to documents, one after another. Knows no tokenizer and keeps nothing.

Every complaint is a UserError that names the file and, where there is one, the line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from ..errors import UserError

HUB = "hub:"
EXTENSIONS = (".jsonl", ".parquet", ".txt")
LARGE_TEXT = 1 << 20  # bytes; a longer .txt file is a corpus, not a document
TEXT_DOCUMENT = 1 << 14  # characters (some 4,000 tokens) after which such a corpus is cut, at the next blank line


@dataclass(frozen=True)
class Document:
    """Either a text or a conversation (a list of {"role", "content"}), and where it stood (for error messages)."""

    where: str
    text: str | None = None
    messages: list[dict[str, str]] | None = None

    def as_bytes(self) -> bytes:
        """UTF-8 of what was read; equal documents give equal bytes.

        Raises:
            UserError: the text holds half of a surrogate pair, which is not Unicode text.
        """
        content = self.text if self.messages is None else json.dumps(self.messages, sort_keys=True, ensure_ascii=False)
        try:
            return content.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(
                f"{self.where}: the text holds a lone surrogate ({content[:40]!r}...)", "repair the \\uD8xx escape"
            ) from None


def read_documents(source: str | Path, text_column: str = "text") -> Iterator[Document]:
    """The documents of one source, in a fixed order; white space alone is no document.

    Args:
        source: a .jsonl file (one {"text": ...} or {"messages": [...]} a line), a .parquet file with such columns, a
            .txt file (one document; above 1 MB it is cut at blank lines into documents of about 16,000 characters),
            a directory written by `datasets` save_to_disk, any other directory (all files of these kinds below it,
            sorted), or "hub:NAME" / "hub:NAME:CONFIG" (streamed, split "train").
        text_column: the field that holds the text; a record without it must have "messages".

    Raises:
        UserError: missing, empty or unreadable source, not UTF-8, bad JSON, neither text nor messages.
    """
    if str(source).startswith(HUB):
        documents = _read_hub(str(source), text_column)
    elif _is_dataset(path := Path(source)):
        documents = _read_dataset(path, text_column)
    else:
        documents = chain.from_iterable(_read_file(file, text_column) for file in source_files(path))
    empty = True
    for document in documents:
        if document.messages or document.text.strip():
            empty = False
            yield document
    if empty:
        raise UserError(f"{source} is empty: it holds no documents", "give at least one text or conversation")


def source_files(source: str | Path) -> list[Path]:
    """The files behind a local source, sorted: the one file, or every data file below a directory.

    Raises:
        UserError: the path does not exist, has an unknown extension, or is a directory without data files.
    """
    path = Path(source)
    if not path.exists():
        raise UserError(f"data {str(source)!r} does not exist", "give a file, a directory or hub:NAME")
    if not path.is_dir():
        if path.suffix.lower() not in EXTENSIONS:
            raise UserError(
                f"{path}: unknown kind of data file {path.suffix!r}",
                f"known are {', '.join(EXTENSIONS)} and directories of them",
            )
        return [path]
    known = (".arrow", ".json") if _is_dataset(path) else EXTENSIONS
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in known and file.is_file())
    if not files:
        raise UserError(f"directory {str(source)!r} holds no data files", f"known are {', '.join(EXTENSIONS)}")
    return files


def _is_dataset(path: Path) -> bool:
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()


def _read_file(path: Path, text_column: str) -> Iterator[Document]:
    try:
        kind = path.suffix.lower()
        if kind == ".jsonl":
            yield from _read_jsonl(path, text_column)
        elif kind == ".parquet":
            yield from _read_parquet(path, text_column)
        else:
            yield from _read_text(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line) with \\n as line end; decoded line by line, so that a bad byte has a line number."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}:{number}: not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1})",
                    "convert the file, for example with: iconv -f latin1 -t utf-8",
                ) from None
            yield number, text.replace("\r\n", "\n")


def _read_jsonl(path: Path, text_column: str) -> Iterator[Document]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}:{number}: not JSON ({error.msg} at column {error.colno})",
                "a .jsonl file has one object a line",
            ) from None
        yield _document(record, text_column, f"{path}:{number}")


def _read_text(path: Path) -> Iterator[Document]:
    cut = path.stat().st_size > LARGE_TEXT
    lines: list[str] = []
    length, first = 0, 1
    for number, line in _lines(path):
        if cut and length >= TEXT_DOCUMENT and not line.strip():
            yield Document(f"{path}:{first}", "".join(lines))
            lines, length, first = [], 0, number + 1
        else:
            lines.append(line)
            length += len(line)
    text = "".join(lines)
    if text.strip():
        yield Document(f"{path}:{first}", text)


def _read_parquet(path: Path, text_column: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a parquet file ({str(error).splitlines()[0]})") from error
    with table:
        columns = [name for name in (text_column, "messages") if name in table.schema_arrow.names]
        if not columns:
            raise _no_content(str(path), text_column, table.schema_arrow.names)
        row = 0
        for batch in table.iter_batches(batch_size=1024, columns=columns):
            for record in batch.to_pylist():
                row += 1
                yield _document(record, text_column, f"{path}: row {row}")


def _read_dataset(path: Path, text_column: str) -> Iterator[Document]:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a saved dataset ({str(error).splitlines()[0]})") from error
    if isinstance(dataset, datasets.DatasetDict):
        if "train" not in dataset:
            raise UserError(f"{path}: has no split 'train' but {sorted(dataset)}", f"give one of them: {path}/SPLIT")
        dataset = dataset["train"]
    yield from _records(dataset, text_column, str(path))


def _read_hub(source: str, text_column: str) -> Iterator[Document]:
    import datasets

    name, _, config = source.removeprefix(HUB).partition(":")
    try:
        dataset = datasets.load_dataset(name, config or None, split="train", streaming=True)
        yield from _records(dataset, text_column, source)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{source}: {(str(error).splitlines() or [type(error).__name__])[0]}",
            "check the name (hub:NAME or hub:NAME:CONFIG) and the network, or give local files",
        ) from error


def _records(dataset: Iterable[dict], text_column: str, where: str) -> Iterator[Document]:
    for row, record in enumerate(dataset, 1):
        yield _document(record, text_column, f"{where}: row {row}")


def _document(record: object, text_column: str, where: str) -> Document:
    if not isinstance(record, dict):
        raise UserError(f"{where}: a {type(record).__name__}, not an object", 'expected {"text": ...}')
    text = record.get(text_column)
    if isinstance(text, str):
        return Document(where, text=text)
    messages = record.get("messages")
    if messages is None:
        if text is not None:
            raise UserError(f"{where}: {text_column!r} is a {type(text).__name__}, not a text")
        raise _no_content(where, text_column, record)
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: 'messages' is not a list with at least one message")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise UserError(f"{where}: a message is {message!r:.80}", 'expected {"role": "user", "content": "..."}')
    return Document(where, messages=[{"role": m["role"], "content": m["content"]} for m in messages])


def _no_content(where: str, text_column: str, columns: Iterable[str]) -> UserError:
    return UserError(
        f"{where}: neither {text_column!r} nor 'messages' among {sorted(columns)}",
        "name the field that holds the text: data.text_column=FIELD",
    )
