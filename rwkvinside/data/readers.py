"""From a file, a directory or a hub name to documents, one after another. Knows no tokenizer and stores nothing.

A reader knows its position and can resume there. Every error is a UserError that names the file and, where there is
one, the line.
"""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import UserError
from .defaults import MAX_LINE_BYTES
from .records import FIELDS, Document, document_of, json_problem, no_content, of_table

HUB = "hub:"
COMPRESSED = (".gz", ".zst")
EXTENSIONS = (".jsonl", ".parquet", ".txt", *(f"{kind}{how}" for kind in (".jsonl", ".txt") for how in COMPRESSED))
LARGE_TEXT = 1 << 20  # bytes; a longer .txt file is a corpus, not a document
TEXT_DOCUMENT = 1 << 14  # characters (some 4,000 tokens) after which such a corpus is cut, at the next blank line

Line = tuple[int, int]  # lines read, bytes read (of what was compressed)

log = logging.getLogger(__name__)


class DocumentReader:
    """The documents of one source in a fixed order, without blank ones.

    To be iterated once.

    Args:
        source: a .jsonl file (one record per line), a .parquet file, a .txt file (one document; above 1 MB or where it
            is compressed, it is cut at blank lines into documents of about 16,000 characters), a directory written by
            `datasets` save_to_disk, any other directory (all files of these kinds below it, also through links,
            sorted), or "hub:NAME" / "hub:NAME:CONFIG" (streamed, split "train"; NAME may be a local directory that
            `datasets` can load). .jsonl and .txt may be compressed: .jsonl.gz, .txt.zst.
        text_column: field that holds a text; `records` says what else a record may be.
        cursor: result of `cursor`; the documents after it follow.
        max_line_bytes: a longer line of a file is refused.
    """

    def __init__(
        self,
        source: str | Path,
        text_column: str = "text",
        cursor: dict | None = None,
        max_line_bytes: int = MAX_LINE_BYTES,
    ):
        self.source, self.text_column, self.max_line_bytes = str(source), text_column, max_line_bytes
        self._cursor = cursor or {}
        self._fresh = cursor is None
        self._dataset = None

    def cursor(self) -> dict:
        """Return the position after the last document as JSON values."""
        if self._dataset is not None:
            return {"datasets": self._dataset.state_dict()}
        return dict(self._cursor)

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents.

        Raises:
            UserError: missing, empty or unreadable source, not UTF-8, bad JSON, a record without a document.
        """
        empty = self._fresh
        for document in self._documents():
            if not document.blank:
                empty = False
                yield document
        if empty:
            raise UserError(f"{self.source} is empty: it holds no documents", "give at least one text or conversation")

    def _documents(self) -> Iterator[Document]:
        if self.source.startswith(HUB):
            return self._of_hub()
        path = Path(self.source)
        return self._of_rows(path) if _is_dataset(path) else self._of_files(source_files(path))

    def _of_files(self, files: list[Path]) -> Iterator[Document]:
        first, at = self._cursor.get("file", 0), self._cursor.get("at")
        for number in range(first, len(files)):
            try:
                start = at if number == first else None
                for document, position in _read_file(files[number], self.text_column, start, self.max_line_bytes):
                    self._cursor = {"file": number, "at": position}
                    yield document
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise UserError(f"{files[number]}: damaged or cut off ({error})", "copy it again") from error
            except OSError as error:
                raise UserError(f"{files[number]}: cannot be read ({error.strerror or error})") from error

    def _of_rows(self, path: Path) -> Iterator[Document]:
        dataset = _saved_dataset(path)
        first = self._cursor.get("row", 0)
        rest = dataset.select(range(first, len(dataset))) if first < len(dataset) else ()
        for row, record in enumerate(rest, first + 1):
            self._cursor = {"row": row}
            yield document_of(of_table(record), self.text_column, f"{path}: row {row}")

    def _of_hub(self) -> Iterator[Document]:
        import datasets
        from huggingface_hub.errors import HTTPError  # of whatever HTTP library it uses

        name, _, config = self.source.removeprefix(HUB).partition(":")
        try:
            self._dataset = datasets.load_dataset(name, config or None, split="train", streaming=True)
            if self._cursor:
                self._dataset.load_state_dict(self._cursor["datasets"])
            for row, record in enumerate(self._dataset, 1):
                where = f"{self.source}: row {row}" if self._fresh else f"{self.source}: row {row} after the cursor"
                yield document_of(of_table(record), self.text_column, where)
        except (OSError, ValueError, RuntimeError, HTTPError) as error:
            raise UserError(
                f"{self.source}: {(str(error).splitlines() or [type(error).__name__])[0]}",
                "check the name (hub:NAME or hub:NAME:CONFIG) and the network, or give local files",
            ) from error


def read_documents(source: str | Path, text_column: str = "text") -> Iterator[Document]:
    """Yield the documents of a source from its beginning, see `DocumentReader`."""
    return iter(DocumentReader(source, text_column))


def source_files(source: str | Path) -> list[Path]:
    """Return the files of a local source, sorted: one file, or all below a directory.

    Raises:
        UserError: the path does not exist, has an unknown extension, is a directory without data files, or one of the
            files is a link to nothing or no file at all (a pipe has no position to resume at).
    """
    path = Path(source)
    if not str(source).strip():
        raise UserError("data is named by an empty text", "give a file, a directory or hub:NAME")
    if not path.is_dir():
        _check_file(path)
        if kind_of(path) is None:
            raise UserError(
                f"{path}: unknown kind of data file {path.suffix!r}",
                f"give {', '.join(EXTENSIONS)}, a directory of them, or .idx with its .bin",
            )
        return [path]
    if _is_dataset(path):
        files = [file for file in _below(path) if file.suffix.lower() in (".arrow", ".json")]
    else:
        files = [file for file in _below(path) if kind_of(file) is not None]
    for file in files:
        _check_file(file)
    if not files:
        raise UserError(
            f"directory {str(source)!r} holds no data files",
            f"data files are {', '.join(EXTENSIONS)}; for a pair of .idx and .bin name the .idx file",
        )
    return files


def kind_of(path: Path) -> str | None:
    """Return the kind of a data file by its name, such as ".jsonl.gz"; None where it is none."""
    name = path.name.lower()
    return next((kind for kind in EXTENSIONS if name.endswith(kind)), None)


def name_skipped(source: str | Path) -> None:
    """Log which files of a directory are not read, hidden ones apart."""
    path = Path(source)
    if str(source).startswith(HUB) or not path.is_dir() or _is_dataset(path):
        return
    skipped = [file.name for file in _below(path) if kind_of(file) is None and not file.name.startswith(".")]
    if skipped:
        more = f" and {len(skipped) - 5} more" if skipped[5:] else ""
        log.warning("%s: not read, because of their names: %s%s", path, ", ".join(skipped[:5]), more)


def _below(directory: Path) -> list[Path]:
    """Return all that is no directory below one, sorted; links to directories are followed, each place once."""
    found, seen = [], set()
    for folder, folders, names in os.walk(directory, followlinks=True):
        seen.add(os.path.realpath(folder))
        folders[:] = sorted(f for f in folders if os.path.realpath(os.path.join(folder, f)) not in seen)
        found += [Path(folder, name) for name in names]
    return sorted(found)


def _check_file(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise UserError(
            f"data {str(path)!r} is a link to {os.readlink(path)}, which does not exist", "mend or remove it"
        )
    if not path.exists():
        raise UserError(f"data {str(path)!r} does not exist", "give a file, a directory or hub:NAME")
    if not path.is_file():
        raise UserError(f"data {str(path)!r} is a pipe or a device, not a file", "write it to a file first")


def _is_dataset(path: Path) -> bool:
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()


def _read_file(path: Path, text_column: str, at, max_line_bytes: int) -> Iterator[tuple[Document, object]]:
    """Yield documents from a position on (None: all), each with the position after it."""
    kind = kind_of(path) or ""
    if kind.startswith(".jsonl"):
        return _read_jsonl(path, text_column, tuple(at or (0, 0)), max_line_bytes)
    if kind == ".parquet":
        return _read_parquet(path, text_column, at or 0)
    return _read_text(path, tuple(at or (0, 0)), max_line_bytes)


def _open(path: Path) -> BinaryIO:
    """Return the uncompressed content of a file.

    Raises:
        UserError: .zst without a library that reads it.
    """
    how = path.suffix.lower()
    if how == ".gz":
        return gzip.open(path, "rb")
    if how != ".zst":
        return path.open("rb")
    try:
        import pyarrow

        return _Zstandard(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))
    except (ImportError, NotImplementedError) as error:
        raise UserError(f"{path}: .zst needs pyarrow ({error})", "pip install pyarrow, or unpack the file") from None


class _Zstandard(io.BufferedReader):
    """The content of a .zst file, in which one can go forward.

    Args:
        stream: of pyarrow, which can only be read on.
    """

    def __init__(self, stream):
        super().__init__(stream, 1 << 20)
        self._at = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        """Read on to a position."""
        while self._at < offset and (skipped := len(self.read(min(offset - self._at, 1 << 20)))):
            self._at += skipped
        return self._at


def _lines(path: Path, start: Line, max_line_bytes: int) -> Iterator[tuple[Line, str]]:
    """Yield each line with the position after it.

    Lines are decoded one by one, so that a bad byte has a line number.
    """
    number, offset = start
    with _open(path) as file:
        file.seek(offset)
        while line := file.readline(max_line_bytes + 1):
            number, offset = number + 1, offset + len(line)
            if len(line) > max_line_bytes:
                raise UserError(
                    f"{path}:{number}: the line has more than {max_line_bytes:,} bytes",
                    "cut it into documents, or raise data.max_line_bytes (--max-line-bytes)",
                )
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                wide = number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff"))
                raise UserError(
                    f"{path}:{number}: not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1})"
                    + (", but UTF-16" if wide else ""),
                    f"convert the file, for example with: iconv -f {'utf-16' if wide else 'latin1'} -t utf-8",
                ) from None
            yield (number, offset), text.replace("\r\n", "\n")


def _read_jsonl(path: Path, text_column: str, start: Line, max_line_bytes: int) -> Iterator[tuple[Document, Line]]:
    for position, line in _lines(path, start, max_line_bytes):
        if not line.strip():
            continue
        where = f"{path}:{position[0]}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = json_problem(error)
            raise UserError(f"{where}: not JSON ({reason})", "a .jsonl file has one object per line") from None
        yield document_of(record, text_column, where), position


def _read_text(path: Path, start: Line, max_line_bytes: int) -> Iterator[tuple[Document, Line]]:
    cut = path.stat().st_size > LARGE_TEXT or path.suffix.lower() in COMPRESSED
    lines: list[str] = []
    length, first, position = 0, start[0] + 1, start
    for position, line in _lines(path, start, max_line_bytes):
        if cut and length >= TEXT_DOCUMENT and not line.strip():
            yield Document(f"{path}:{first}", "".join(lines)), position
            lines, length, first = [], 0, position[0] + 1
        else:
            lines.append(line)
            length += len(line)
    if lines:
        yield Document(f"{path}:{first}", "".join(lines)), position


def _read_parquet(path: Path, text_column: str, row: int) -> Iterator[tuple[Document, int]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            columns = [name for name in names if name in (text_column, *FIELDS)]
            if not columns:
                raise no_content(str(path), text_column, names)
            group, before = 0, 0
            while group < table.num_row_groups and before + table.metadata.row_group(group).num_rows <= row:
                before += table.metadata.row_group(group).num_rows
                group += 1
            groups = range(group, table.num_row_groups)
            skip = row - before
            for batch in table.iter_batches(batch_size=1024, columns=columns, row_groups=groups) if groups else ():
                for record in batch.slice(min(skip, len(batch))).to_pylist():
                    row += 1
                    yield document_of(of_table(record), text_column, f"{path}: row {row}"), row
                skip = max(0, skip - len(batch))
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # the last two: texts and dates that are none
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a parquet file, or damaged ({reason})", "write it again") from error


def _saved_dataset(path: Path):
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a saved dataset ({str(error).splitlines()[0]})") from error
    if isinstance(dataset, datasets.DatasetDict):
        if "train" not in dataset:
            raise UserError(
                f"{path} has no split 'train', only {', '.join(sorted(dataset))}", f"name one of them: {path}/SPLIT"
            )
        dataset = dataset["train"]
    return dataset
