"""The text of the demo: the Python standard library's own sources and documentation strings, found on this machine.

Writes train.jsonl and val.jsonl in the format that `--data` reads. Knows nothing of models or tokenizers.
"""

import ast
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..support.files import write_text

# Tests and generated tables are long and repetitive: they teach a model little about language.
SKIPPED_FOLDERS = {
    *("test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "encodings"),
    *("site-packages", "dist-packages", "__pycache__"),
}
PIECE_CHARACTERS = 1500  # about 500 tokens: most documents fit into a context of 512
MIN_PIECE_CHARACTERS = 200
MAX_PIECE_CHARACTERS = 4 * PIECE_CHARACTERS  # longer than this without a blank line is a table of data
MIN_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class Corpus:
    """Training and validation documents, from different source files."""

    train: list[str]
    val: list[str]

    @property
    def digest(self) -> str:
        """SHA-256 of the text (hex), which depends on the machine's Python."""
        sha = hashlib.sha256()
        for documents in (self.train, self.val):
            for document in documents:
                sha.update(document.encode("utf-8"))
                sha.update(b"\0")
            sha.update(b"\1")
        return sha.hexdigest()

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write train.jsonl and val.jsonl, one {"text": ...} per line; return their paths."""
        paths = folder / "train.jsonl", folder / "val.jsonl"
        for path, documents in zip(paths, (self.train, self.val), strict=True):
            write_text(path, "".join(json.dumps({"text": document}) + "\n" for document in documents))
        return paths


def source_files(root: Path) -> Iterator[Path]:
    """Yield the .py files below `root` in a fixed order, without SKIPPED_FOLDERS."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in SKIPPED_FOLDERS)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))


def pieces(text: str, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Cut a text at the first blank line after every `size` characters."""
    lines: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        if length >= size and not line.strip():
            yield "".join(lines).strip("\n") + "\n"
            lines, length = [], 0
        lines.append(line)
        length += len(line)
    yield "".join(lines).strip("\n") + "\n"


def texts(name: str, source: str) -> list[str]:
    """Return the readable texts of a source file.

    These are the file itself, or the manual pages that `help()` keeps in one dictionary.
    """
    if name != "pydoc_data/topics.py":
        return [source]
    assignments = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    return [page for node in assignments for page in ast.literal_eval(node.value).values()]


def collect(root: Path | None = None, *, val_every: int = 40, min_characters: int = MIN_CHARACTERS) -> Corpus:
    """Read the standard library and split it by source file.

    Args:
        root: folder to read; None is the standard library of the running interpreter.
        val_every: one file in so many is for validation; a hash of its path decides, so that the split does not change
            when files are added.
        min_characters: refuse less text than this.

    Raises:
        UserError: too little text (a stripped Python without its sources).
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    train: list[str] = []
    val: list[str] = []
    total = 0
    for path in source_files(root):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few sources declare another encoding on purpose
            continue
        name = path.relative_to(root).as_posix()
        is_val = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % val_every == 0
        documents = [
            piece
            for readable in texts(name, text)
            for piece in pieces(readable)
            if MIN_PIECE_CHARACTERS <= len(piece) <= MAX_PIECE_CHARACTERS
        ]
        (val if is_val else train).extend(documents)
        total += sum(map(len, documents))
    if total < min_characters or not val:
        raise UserError(
            f"only {total:,} characters of Python source in {len(val)} validation documents below {root}; "
            f"the demo needs {min_characters:,}",
            "use a Python that has its standard library as .py files",
        )
    return Corpus(train, val)
