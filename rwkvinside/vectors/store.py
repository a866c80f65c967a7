"""Vectors on disk: complete or absent, described by a sealed card, checked when they are read.

DIR/vectors.npy    (N, d) fp32
DIR/meta.jsonl     a line for each vector: {"document": 3, "text": "...", "code": 4096}
DIR/card.json      space, dim, embedder, source, counts, SHA-256 of the other two, and a seal
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..support.files import file_digest, publish, temporary_sibling
from ..support.sealed import read_sealed, sealed_text
from . import tmd
from .corpora import documents_of, flat
from .data import VectorData
from .embedders import embedder

VECTORS, META, CARD = "vectors.npy", "meta.jsonl", "card.json"


def embed(source: str, spec: str, out: Path, limit: int | None = None) -> VectorData:
    """Embed the sentences of a source and write them.

    The TMD domain of a document is its cluster, by k-means over the documents' mean vectors; task and modifier are 0.

    Args:
        source: see `corpora.documents_of`.
        spec: of the embedder.
        out: directory, which must not exist yet or be empty.
        limit: at most so many sentences, in whole documents.

    Raises:
        UserError: see `documents_of`, `embedder` and `write_store`.
    """
    check_new(out)
    model = embedder(spec)
    texts, numbers = flat(documents_of(source), limit)
    vectors, documents = model.encode(texts), torch.tensor(numbers)
    domains = tmd.cluster_domains(vectors, documents)
    zero = torch.zeros_like(domains)
    card = {
        "source": source,
        "embedder": model.name,
        "space": model.space,
        "dim": model.dim,
        "model_sha256": model.sha256,
    }
    data = VectorData(
        vectors, documents, texts, tmd.pack(domains, zero, zero), card | {"codes": "k-means of documents"}
    )
    write_store(data, out)
    return data


def check_new(out: Path) -> None:
    """Refuse a place where something is (`UserError`)."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty", "name another --out, or remove it")


def write_store(data: VectorData, out: Path) -> None:
    """Write vectors with their texts and codes.

    Raises:
        UserError: something is there, or it cannot be written.
    """
    check_new(out)
    try:
        with temporary_sibling(out) as temporary:
            temporary.mkdir()
            np.save(temporary / VECTORS, data.vectors.numpy())
            (temporary / META).write_text("".join(f"{json.dumps(line)}\n" for line in _lines(data)), encoding="utf-8")
            counts = {"vectors": len(data.vectors), "documents": len(data.documents.unique())}
            digests = {name: file_digest(temporary / name) for name in (VECTORS, META)}
            (temporary / CARD).write_text(sealed_text(data.card | counts | {"sha256": digests}), encoding="utf-8")
            publish(temporary, out)
    except OSError as error:
        raise UserError(
            f"cannot write {out}: {error.strerror or error}", "free space, or name another --out"
        ) from error


def read_store(path: str | Path) -> VectorData:
    """Return stored vectors.

    Raises:
        UserError: there are none, or they are not what was written.
    """
    folder = Path(path)
    if not (folder / CARD).is_file():
        raise UserError(
            f"{folder} holds no vectors: it has no {CARD}",
            "make them: rwkvinside vectors embed; or synthetic:rotor-lin",
        )
    try:
        card, _ = read_sealed(folder / CARD)
        for name, digest in card["sha256"].items():
            if file_digest(folder / name) != digest:
                raise ValueError(f"{name} was changed after it was written")
        vectors = torch.from_numpy(np.load(folder / VECTORS, allow_pickle=False))
        lines = [json.loads(line) for line in (folder / META).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"vectors in {folder}: {error}", "embed the text again") from error
    return VectorData(
        vectors,
        torch.tensor([line["document"] for line in lines]),
        [line["text"] for line in lines] if lines and "text" in lines[0] else None,
        torch.tensor([line["code"] for line in lines]) if lines and "code" in lines[0] else None,
        card,
    )


def _lines(data: VectorData) -> list[dict]:
    lines: list[dict] = [{"document": number} for number in data.documents.tolist()]
    for name, values in (("text", data.texts), ("code", _listed(data.codes))):
        if values is not None:
            for line, value in zip(lines, values, strict=True):
                line[name] = value
    return lines


def _listed(codes: Tensor | None) -> list[int] | None:
    return None if codes is None else codes.tolist()
