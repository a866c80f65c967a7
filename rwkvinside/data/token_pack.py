"""Packed data: tokenized documents in a directory that can be copied and used as a source; knows its tokenizer."""

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

AGAIN = "copy it again, or make it anew with `rwkvinside data pack`"


def is_pack(source: str | Path) -> bool:
    """Return whether a source is a directory that `write_pack` made, damaged or not."""
    return all((Path(source) / name).is_file() for name in (META, "tokens.bin"))


def open_pack(source: str | Path, tokenizer, tokenizer_hash: str, cache: Path) -> TokenStore:
    """Return the documents of a pack.

    Every byte is checked against the hashes written with the pack; a file in `cache` remembers that it was checked.
    What is damaged later is noticed when it is used.

    Raises:
        UserError: the pack is damaged, or made with another tokenizer.
    """
    path = Path(source)
    stats = stats_of(sorted(file for file in path.iterdir() if file.is_file()))
    verified = cache / f"{entry_key({'pack': stats})}.verified"
    if problem := damage(path, every_byte=not verified.exists()):
        raise UserError(f"packed data {path} is damaged: {problem}", AGAIN)
    meta = read_meta(path)
    if (pack_hash := str(meta.get("tokenizer"))) != tokenizer_hash:
        raise UserError(
            f"packed data {path} was made with the tokenizer {meta.get('tokenizer_name', '?')} "
            f"(SHA-256 {pack_hash[:12]}), not with {tokenizer.name_or_path} ({tokenizer_hash[:12]})",
            "pack the text again with the tokenizer of this run",
        )
    if not verified.exists():
        with writing(verified) as unfinished:
            unfinished.touch()
    return open_store(path, AGAIN)


def write_pack(store: TokenStore, out: Path, meta: Mapping) -> None:
    """Write the documents that a store shows.

    Args:
        store: any store.
        out: the directory to create.
        meta: JSON values for meta.json; must include `tokenizer`, the hash of the tokenizer.

    Raises:
        UserError: the directory cannot be written.
    """
    with writing(out) as unfinished, StoreWriter(unfinished) as writer:
        for i in range(store.num_documents):
            ids, _ = store.piece(i)
            loss = None if store.loss is None else ~store.masked(i)
            writer.add(Encoded(int(store.hashes[store.selected[i]]), ids.astype("uint32"), loss))
        writer.finish({"key": store.fingerprint, **meta, "facts": dict(store.facts)})
