"""A teacher's most likely next tokens on disk, row by row of a stage.

They are written once in shards, and read in training:

DIR/index.json                  identity of what was written, finished shards with their rows, size and SHA-256; sealed
DIR/logits-00000.safetensors    positions with a label of the shard's rows, one after another:
    ids        (N, k) int32, the likeliest first
    log_probs  (N, k + 1) fp16, last the logarithm of the mass of all other tokens. fp16 keeps a probability to 0.4 %
               down to e^-16; normalized again after reading, this changes a KL divergence by less than 1e-5 nats.
    offsets    (rows + 1,) int64, where each row begins
    digests    (rows,) int64 of each row's tokens and labels

Knows neither tokenizers nor models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..data.batch import IGNORE, Batch
from ..errors import UserError
from ..support.files import file_digest, remove_unfinished, replacing
from ..support.lock import entries
from ..support.names import ALLOWED, is_name
from ..support.sealed import sealed_text, unsealed

FORMAT = 2
INDEX = "index.json"
SHARD_BYTES = 2**25
AGAIN = "run the same `rwkvinside data logits` again: it goes on where it stopped"


def row_digests(batch: Batch) -> Tensor:
    """Return a hash of each row's tokens, labels and documents, (rows,) int64.

    It does not depend on how far a row is padded.
    """
    digests = []
    for real, *fields in zip(batch.mask, batch.input_ids, batch.labels, batch.segment_ids, strict=True):
        content = b"".join(field[real].cpu().to(torch.int64).numpy().tobytes() for field in fields)
        digests.append(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True))
    return torch.tensor(digests, dtype=torch.int64)


def position_bytes(k: int) -> int:
    """Return how many bytes a position with a label takes on disk."""
    return 4 * k + 2 * (k + 1)


class LogitsWriter:
    """A directory that shards are added to; what an earlier process finished stays.

    Args:
        directory: made if missing; must be empty or hold logits of the same identity.
        identity: JSON values by a name that a message can use; equal ones give equal rows and logits.
        k: tokens of a position.
        vocab: distributions are over the ids below this.
        rows: of the stage; rows [0, rows) are to be written.
        rows_per_shard: the same for all shards but the last.

    Raises:
        UserError: the directory holds something else, or cannot be written.
    """

    def __init__(self, directory: str | Path, identity: Mapping, *, k: int, vocab: int, rows: int, rows_per_shard: int):
        self.path = Path(directory)
        facts = {"format": FORMAT, "k": k, "vocab": vocab, "rows_per_shard": rows_per_shard}
        shards = {}
        if self.path.is_dir():
            remove_unfinished(self.path)  # of a process that was killed
        if (self.path / INDEX).exists():
            old = _read_index(self.path)
            check_identity(self.path, old["identity"], identity)
            check_identity(self.path, {name: old.get(name) for name in facts}, facts)
            shards = old["shards"]
        elif self.path.exists() and not (self.path.is_dir() and not entries(self.path)):
            raise UserError(f"output {self.path} is not empty and holds no logits", "name another directory with --out")
        self._index = facts | {"identity": dict(identity), "rows": rows, "shards": shards}
        self._write(INDEX, sealed_text(self._index).encode())

    @property
    def shard_rows(self) -> list[range]:
        """The rows of each shard."""
        size, rows = self._index["rows_per_shard"], self._index["rows"]
        return [range(first, min(first + size, rows)) for first in range(0, rows, size)]

    def missing(self) -> list[range]:
        """Return the rows of the shards that are still to be written, or are not what was written."""
        done = {
            tuple(shard["rows"])
            for name, shard in self._index["shards"].items()
            if _whole(self.path, name, shard) and file_digest(self.path / name) == shard["sha256"]
        }
        return [rows for rows in self.shard_rows if (rows.start, rows.stop) not in done]

    def write(self, rows: range, ids: Tensor, log_probs: Tensor, counts: Tensor, digests: Tensor) -> None:
        """Write one shard, all of it or nothing.

        Args:
            rows: one of `missing`.
            ids, log_probs: (N, k) and (N, k + 1) of the positions with a label.
            counts: (rows,) positions of each row.
            digests: see `row_digests`.
        """
        content = save(
            {
                "ids": ids.to(torch.int32).contiguous(),
                "log_probs": log_probs.to(torch.float16).contiguous(),
                "offsets": torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int64),
                "digests": digests,
            }
        )
        name = f"logits-{rows.start // self._index['rows_per_shard']:05d}.safetensors"
        self._write(name, content)
        digest = hashlib.sha256(content).hexdigest()
        facts = {"rows": [rows.start, rows.stop], "positions": len(ids), "bytes": len(content), "sha256": digest}
        self._index["shards"][name] = facts
        self._write(INDEX, sealed_text(self._index).encode())

    def _write(self, name: str, content: bytes) -> None:
        try:
            with replacing(self.path / name) as temporary:
                temporary.write_bytes(content)
        except OSError as error:
            raise UserError(f"logits cannot be written to {self.path} ({error.strerror or error})", AGAIN) from error


class _Shard(NamedTuple):
    """An open shard; `ids` and `log_probs` are read from disk when they are sliced."""

    first: int
    offsets: Tensor
    digests: Tensor
    ids: object
    log_probs: object


class LogitsReader:
    """What a `LogitsWriter` has finished.

    Args:
        directory: of the writer.

    Attributes:
        identity, k, vocab: those of the writer.
        rows: that were to be written.

    Raises:
        UserError: there are no logits, or their index is damaged.
    """

    def __init__(self, directory: str | Path):
        self.path = Path(directory)
        index = _read_index(self.path)
        self.identity, self.k, self.vocab = index["identity"], index["k"], index["vocab"]
        self._rows_per_shard = index["rows_per_shard"]
        self.rows = max([index["rows"], *(shard["rows"][1] for shard in index["shards"].values())])
        self._shards = {shard["rows"][0]: (name, shard) for name, shard in index["shards"].items()}
        self._open = lru_cache(maxsize=4)(self._open_shard)

    def require(self, rows: int) -> None:
        """Refuse logits in which some of rows [0, rows) are missing.

        Raises:
            UserError: rows that were not written, or a file that is missing or cut.
        """
        for first in range(0, rows, self._rows_per_shard):
            last = min(first + self._rows_per_shard, rows)
            if first not in self._shards or self._shards[first][1]["rows"][1] < last:
                count = sum(shard["rows"][1] - shard["rows"][0] for _, shard in self._shards.values())
                raise UserError(f"the logits in {self.path} are incomplete: {count} of {rows} rows", AGAIN)
            name, shard = self._shards[first]
            if not _whole(self.path, name, shard):
                raise UserError(
                    f"{self.path / name} is missing or does not have the {shard['bytes']} bytes that were written",
                    AGAIN,
                )

    def batch(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what is stored for the batch's positions with a label, row by row.

        Returns:
            Ids (N, k) int32 and log-probabilities (N, k + 1) fp16.

        Raises:
            UserError: a damaged shard; a row that has other tokens or labels than when the logits were written.
        """
        counts = (batch.labels != IGNORE).sum(1).tolist()
        ids, log_probs = [], []
        for row, digest, count in zip(batch.rows, row_digests(batch), counts, strict=True):
            shard = self._open(row - row % self._rows_per_shard)
            at = row - shard.first
            if shard.digests[at] != digest:
                raise UserError(
                    f"row {row} of the data is not the one whose logits are in {self.path}",
                    "the data or the code that makes rows has changed: write the logits again into another directory",
                )
            start = int(shard.offsets[at])
            ids.append(shard.ids[start : start + count])
            log_probs.append(shard.log_probs[start : start + count])
        return torch.cat(ids), torch.cat(log_probs)

    def _open_shard(self, first: int) -> _Shard:
        name, facts = self._shards[first]
        path = self.path / name
        try:
            if file_digest(path) != facts["sha256"]:
                raise UserError(f"{path} is corrupt: its SHA-256 is not the one written", AGAIN)
            file = safe_open(path, "pt")
            slices = [file.get_slice(name) for name in ("ids", "log_probs")]
            return _Shard(first, file.get_tensor("offsets"), file.get_tensor("digests"), *slices)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read: {error}", AGAIN) from error


def check_identity(path: Path, stored: Mapping, expected: Mapping) -> None:
    """Refuse logits of another identity.

    Raises:
        UserError: names the first property in which they differ.
    """
    for name in dict.fromkeys([*expected, *stored]):
        if stored.get(name) != expected.get(name):
            raise UserError(
                f"the logits in {path} are not those of this run: {name} {stored.get(name)!r} there, "
                f"{expected.get(name)!r} here",
                "write logits for this run into another directory with `rwkvinside data logits`",
            )


def _whole(path: Path, name: str, facts: Mapping) -> bool:
    file = path / name
    return file.is_file() and file.stat().st_size == facts["bytes"]


def _read_index(path: Path) -> dict:
    file = path / INDEX
    if not file.is_file():
        raise UserError(f"there are no logits in {path}", "write them with `rwkvinside data logits`")
    try:
        index = unsealed(file.read_text(encoding="utf-8"))
        form = index["format"]
        _ = {name: index[name] for name in ("identity", "k", "vocab", "rows_per_shard", "rows")}
        _ = [(shard["rows"][1], shard["bytes"], shard["sha256"]) for shard in index["shards"].values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{file} is damaged: {error!r}", "write the logits again into another directory") from error
    if outside := [name for name in index["shards"] if not is_name(name)]:
        raise UserError(f"{file} names the file {outside[0]!r}", f"names of files beside it are allowed: {ALLOWED}")
    if form != FORMAT:
        raise UserError(f"the logits in {path} have format {form!r}", f"this version reads format {FORMAT}")
    return index
