"""From sources to token ids, once: text is tokenized into a cache directory, ids that exist are used where they lie.

The name of a cache entry is a hash of the source (path, size and modification time of each file), the tokenizer with
its chat template, and the options. Knows nothing of rows or order.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from ..errors import UserError
from .binidx import is_binidx, pair, read_binidx, scan
from .encode import CHUNK_DOCUMENTS, Encoder, check_ids, chunks, tokenizer_hash
from .readers import HUB, DocumentReader, source_files
from .token_pack import is_pack, open_pack, write_pack
from .token_store import StoreWriter, TokenStore, check_vocab, entry_key, is_whole, join, open_store, stats_of, writing

Progress = Callable[[int, int], None]


def load_tokens(
    sources: Sequence[str | Path],
    tokenizer,
    *,
    cache_dir: str | Path,
    vocab_size: int | None = None,
    text_column: str = "text",
    add_bos: bool | None = None,
    add_eos: bool | None = None,
    rotate: bool = True,
    trust_ids: bool = False,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> TokenStore:
    """Tokenize the documents of `sources`, or reuse what an earlier call with the same input left in `cache_dir`.

    Args:
        sources: see `DocumentReader`; besides a directory that `pack` wrote, and NAME.idx with its NAME.bin. Their
            documents follow one another.
        tokenizer: a Hugging Face tokenizer.
        cache_dir: directory of the cache, made if missing; several processes may use it at once.
        vocab_size: rows of the teacher's embedding; token ids beyond are refused.
        text_column: the field that holds the text.
        add_bos, add_eos, rotate: see `Encoder`.
        trust_ids: take ids that come with the data without trying whether the tokenizer gives such.
        max_tokens: stop after the document with which this many tokens are reached (for endless sources).
        progress: called with (documents, tokens) of a source so far; not called when the cache is used.

    Raises:
        UserError: bad data (the line names file and line), ids beyond the vocabulary or of another tokenizer, a cache
            that cannot be written.
    """
    encoder = Encoder(tokenizer, add_bos=add_bos, add_eos=add_eos, rotate=rotate)
    stores: list[TokenStore] = []
    left = max_tokens
    for source in sources:
        if left is not None and left <= 0:
            break
        if is_pack(source):
            store = open_pack(source, encoder.tokenizer, encoder.identity["tokenizer"], Path(cache_dir))
        elif is_binidx(source):
            store = _open_binidx(source, Path(cache_dir), progress)
        else:
            store = _tokenized(source, encoder, Path(cache_dir), text_column, vocab_size, left, progress)
        if vocab_size is not None:
            store.check_vocab(vocab_size)
        if store.facts.get("kind tokens") and not trust_ids:
            check_ids(store, tokenizer, str(source))
        if left is not None:
            store = store.first(left, reach=True)
            left -= store.num_tokens
        stores.append(store)
    return join(stores)


def pack(
    sources: Sequence[str | Path],
    out: Path,
    tokenizer,
    *,
    vocab_size: int | None = None,
    text_column: str = "text",
    rotate: bool = True,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> TokenStore:
    """Tokenize sources into a directory of their own, see `write_pack`.

    Args:
        out: the directory to be made.
        sources, tokenizer, vocab_size, text_column, rotate, max_tokens, progress: see `load_tokens`.

    Returns:
        What is in the directory.

    Raises:
        UserError: bad data, an output that is there already or cannot be written.
    """
    if out.exists():
        raise UserError(f"output {out} exists already", "name a new directory with --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        cache = tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent)
    except OSError as error:
        raise UserError(
            f"output {out} cannot be written ({error.strerror or error})", "name another directory with --out"
        ) from error
    with cache as folder:
        store = load_tokens(
            sources,
            tokenizer,
            cache_dir=folder,
            vocab_size=vocab_size,
            text_column=text_column,
            rotate=rotate,
            max_tokens=max_tokens,
            progress=progress,
        )
        meta = {
            "sources": [Path(source).name if Path(source).exists() else str(source) for source in sources],
            "tokenizer": tokenizer_hash(tokenizer),
            "tokenizer_name": Path(tokenizer.name_or_path).name,
        }
        write_pack(store, out, meta)
    return open_store(out)


def source_identity(source: str | Path) -> list:
    """JSON values that change when the source does, without reading it."""
    if str(source).startswith(HUB):
        return [str(source)]
    return stats_of(pair(source) if is_binidx(source) else source_files(source))


def _tokenized(
    source: str | Path,
    encoder: Encoder,
    cache: Path,
    text_column: str,
    vocab_size: int | None,
    max_tokens: int | None,
    progress: Progress | None,
) -> TokenStore:
    identity = {
        "source": source_identity(source),
        "text_column": text_column,
        "max_tokens": max_tokens,
        **encoder.identity,
    }
    entry = cache / entry_key(identity)
    if not is_whole(entry):
        with writing(entry) as unfinished, StoreWriter(unfinished) as writer:
            documents = (
                document for chunk in chunks(DocumentReader(source, text_column)) for document in encoder(chunk)
            )
            for document in documents:
                writer.add(document)
                if vocab_size is not None:
                    check_vocab(writer.max_id, vocab_size)
                if progress is not None and writer.documents % CHUNK_DOCUMENTS == 0:
                    progress(writer.documents, writer.tokens)
                if max_tokens is not None and writer.tokens >= max_tokens:
                    break
            if not writer.documents:
                raise UserError(
                    "the tokenizer finds no token in the data", "check the files and that the tokenizer fits them"
                )
            if progress is not None:
                progress(writer.documents, writer.tokens)
            writer.finish(identity)
    return open_store(entry)


def _open_binidx(source: str | Path, cache: Path, progress: Progress | None) -> TokenStore:
    """The ids stay where they are; what has to be read once (hashes, largest id) is kept in the cache."""
    tokens, offsets = read_binidx(source)
    entry = cache / f"{entry_key({'binidx': source_identity(source)})}.npz"
    try:
        with np.load(entry) as known:
            hashes, max_id = known["hashes"], int(known["max_id"])
    except (OSError, ValueError, KeyError, BadZipFile):  # not there, or damaged
        hashes, max_id = scan(tokens, offsets, str(source), progress)
        with writing(entry) as unfinished, unfinished.open("wb") as file:
            np.savez(file, hashes=hashes, max_id=max_id)
    return TokenStore(
        tokens=tokens,
        offsets=offsets,
        hashes=hashes,
        loss=None,
        selected=np.arange(len(hashes)),
        fingerprint=entry.stem,
        max_id=max_id,
        facts={"kind tokens": len(hashes)},
    )
