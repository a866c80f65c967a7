"""Tokenized data as a directory of its own, to be copied and used as a source: a store that knows its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..errors import UserError
from .token_store import (
    META,
    Encoded,
    StoreWriter,
    TokenStore,
    damage,
    entry_key,
    open_store,
    read_meta,
    stats_of,
    writing,
)


def is_pack(source: str | Path) -> bool:
    """Whether a source is a directory that `write_pack` made, damaged or not."""
    return all((Path(source) / name).is_file() for name in (META, "tokens.bin"))


def open_pack(source: str | Path, tokenizer, tokenizer_hash: str, cache: Path) -> TokenStore:
    """The documents of a pack.

    Every byte is checked against the hashes that were written with it, once: a file in `cache` remembers it.

    Raises:
        UserError: the pack is damaged, or of another tokenizer.
    """
    path = Path(source)
    stats = stats_of(sorted(file for file in path.iterdir() if file.is_file()))
    verified = cache / f"{entry_key({'pack': stats})}.verified"
    if found := damage(path, every_byte=not verified.exists()):
        raise UserError(f"packed data {path} is damaged: {found}", "copy it again, or make it: rwkvinside data pack")
    meta = read_meta(path)
    if (made := str(meta.get("tokenizer"))) != tokenizer_hash:
        raise UserError(
            f"packed data {path} is of the tokenizer {meta.get('tokenizer_name', '?')} (SHA-256 {made[:12]}), not of "
            f"{tokenizer.name_or_path} ({tokenizer_hash[:12]})",
            "pack the text again with the tokenizer of this run",
        )
    if not verified.exists():
        with writing(verified) as unfinished:
            unfinished.touch()
    return open_store(path)


def write_pack(store: TokenStore, out: Path, meta: Mapping) -> None:
    """Write the documents that a store shows.

    Args:
        store: any.
        out: the directory to be made.
        meta: JSON values to keep; `tokenizer`, its hash, must be among them.

    Raises:
        UserError: the directory cannot be written.
    """
    with writing(out) as unfinished, StoreWriter(unfinished) as writer:
        for i in range(store.num_documents):
            ids, _ = store.piece(i)
            loss = None if store.loss is None else ~store.masked(i)
            writer.add(Encoded(int(store.hashes[store.selected[i]]), ids.astype("uint32"), loss))
        writer.finish({"key": store.fingerprint, **meta, "facts": dict(store.facts)})
