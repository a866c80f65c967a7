r"""Token ids of Megatron-LM and RWKV-LM, NAME.bin and NAME.idx ("binidx", magic MMIDIDX), used where they are.

NAME.idx: b"MMIDIDX\0\0", version (uint64, 1), type of the ids (uint8), S sequences (uint64), D (uint64); then S
sizes (int32, tokens), S pointers (int64, bytes into NAME.bin), D document boundaries (int64, in sequences). Newer files
continue with a mode for each sequence, which text does not need. In Megatron's files a document may have several
sequences; RWKV's have one sequence per document, and some of them have no usable boundaries.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..errors import UserError
from .records import content_hash

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<QBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
PROGRESS = 4096  # documents between two reports


def is_binidx(source: str | Path) -> bool:
    """Return whether a source names such a pair: NAME.idx, NAME.bin, or NAME for both."""
    path = Path(source)
    return path.suffix in (".idx", ".bin") or (not path.exists() and all(file.is_file() for file in pair(path)))


def pair(source: str | Path) -> tuple[Path, Path]:
    """Return the paths (index, data) for a name with or without its suffix."""
    path = Path(source)
    stem = path.with_suffix("") if path.suffix in (".idx", ".bin") else path
    return stem.with_name(stem.name + ".idx"), stem.with_name(stem.name + ".bin")


def read_binidx(source: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Map the ids of all documents into memory and read where each document begins.

    Returns:
        (tokens, offsets): integers of the file's type; int64 (documents + 1,).

    Raises:
        UserError: a file is missing, is something else, or does not hold what the index says.
    """
    index, data = pair(source)
    for file in (index, data):
        if not file.is_file():
            raise UserError(f"{file} does not exist", "a binidx data set is a pair of .idx and .bin files")
    content = np.memmap(index, dtype=np.uint8, mode="r") if index.stat().st_size else np.empty(0, np.uint8)
    start = len(MAGIC) + HEADER.size
    if bytes(content[: len(MAGIC)]) != MAGIC or len(content) < start:
        raise UserError(
            f"{index}: not a binidx index (it does not begin with MMIDIDX)", "give text, or write the index again"
        )
    version, code, count, boundaries = HEADER.unpack(bytes(content[len(MAGIC) : start]))
    if version != 1 or code not in DTYPES:
        raise UserError(f"{index}: version {version} with type {code}", f"supported: version 1, types {_types()}")
    ends = np.cumsum([start, 4 * count, 8 * count, 8 * boundaries])
    if len(content) < ends[-1]:
        raise UserError(
            f"{index}: {len(content)} bytes, but {count} sequences need {ends[-1]}",
            "the index is truncated: copy it again",
        )
    sizes, pointers, documents = (
        np.frombuffer(content[a:b].tobytes(), dtype=dtype).astype(np.int64)
        for (a, b), dtype in zip(pairwise(ends), ("<i4", "<i8", "<i8"), strict=True)
    )
    dtype = np.dtype(DTYPES[code])
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    size = data.stat().st_size
    if not offsets[-1]:
        raise UserError(f"{index}: it holds no tokens", "give at least one document")
    if (sizes < 0).any() or size != offsets[-1] * dtype.itemsize:
        raise UserError(
            f"{data}: {size} bytes, but the index has {offsets[-1]} tokens of {dtype.itemsize} bytes",
            "one of the two files is truncated, or they do not belong together",
        )
    if (pointers != offsets[:-1] * dtype.itemsize).any():
        raise UserError(f"{index}: the sequences are not contiguous", "write it again with the tool that made it")
    # Boundaries that do not partition the sequences say nothing: then each sequence is a document.
    if boundaries > 1 and documents[0] == 0 and documents[-1] == count and (np.diff(documents) >= 0).all():
        offsets = offsets[documents]
    return np.memmap(data, dtype=dtype, mode="r"), np.unique(offsets)


def scan(
    tokens: np.ndarray, offsets: np.ndarray, where: str, progress: Callable[[int, int], None] | None = None
) -> tuple[np.ndarray, int]:
    """Read all ids once, for the hash of each document and the largest id.

    Args:
        tokens, offsets: from `read_binidx`.
        where: for messages.
        progress: called with (documents, tokens) so far.

    Returns:
        (hashes, max_id): uint64 hash of each document's content; the largest id.

    Raises:
        UserError: a negative id.
    """
    hashes, highest = np.empty(len(offsets) - 1, dtype=np.uint64), 0
    for i, (a, b) in enumerate(pairwise(offsets)):
        ids = tokens[a:b]
        if ids.min() < 0:
            raise UserError(f"{where} holds token id {ids.min()}", "token ids are not negative")
        highest = max(highest, int(ids.max()))
        hashes[i] = content_hash(ids.astype(np.uint32).tobytes())
        if progress is not None and i % PROGRESS == 0:
            progress(i, int(b))
    return hashes, highest


def _types() -> str:
    return ", ".join(f"{code} ({np.dtype(dtype)})" for code, dtype in DTYPES.items())
