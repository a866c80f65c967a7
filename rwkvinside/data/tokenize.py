"""From sources to token ids, once: text is tokenized into a cache, existing ids are used where they are.

The name of a cache entry is a hash of the source (path, size and modification time of each file), the tokenizer with
its chat template, and the options. Knows nothing of rows or order.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..support.scratch import scratch
from .binidx import is_binidx, pair, read_binidx, scan
from .catalog import resolve_names
from .defaults import DATE, MAX_LINE_BYTES
from .encode import CHUNK_DOCUMENTS, Encoder, check_ids, chunks, tokenizer_hash
from .readers import HUB, DocumentReader, name_skipped, source_files
from .token_pack import AGAIN, is_pack, open_pack, write_pack
from .token_store import StoreWriter, TokenStore, check_vocab, entry_key, is_whole, join, open_store, stats_of, writing

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (documents, tokens) of a source so far."""


@dataclass(frozen=True)
class ReadOptions:
    """How sources are read and which token ids are accepted.

    Attributes:
        text_column: field that holds a text.
        rotate, today, end: see `Encoder`.
        vocab_size: rows of the teacher's embedding; larger token ids are refused. None accepts any.
        trust_ids: accept token ids that come with the data without checking that the tokenizer would give them.
        max_tokens: stop after the document with which this many tokens are reached (for endless sources).
        max_line_bytes: a longer line of a file is refused.
    """

    text_column: str = "text"
    rotate: bool = True
    today: str = DATE
    end: bool = False
    vocab_size: int | None = None
    trust_ids: bool = False
    max_tokens: int | None = None
    max_line_bytes: int = MAX_LINE_BYTES


def load_tokens(
    sources: Sequence[str | Path],
    tokenizer,
    options: ReadOptions | None = None,
    *,
    cache_dir: str | Path,
    progress: Progress | None = None,
) -> TokenStore:
    """Tokenize sources, or reuse what an earlier call with the same input cached.

    Args:
        sources: see `DocumentReader`; also a directory that `pack` wrote, or NAME.idx with its NAME.bin. Their
            documents follow one another.
        tokenizer: a Hugging Face tokenizer.
        options: None for the defaults.
        cache_dir: directory of the cache, created if missing; several processes may use it at once.
        progress: not called when the cache is used.

    Raises:
        UserError: bad data (the message names file and line), ids beyond the vocabulary or from another tokenizer, a
            cache that cannot be written.
    """
    options, cache = options or ReadOptions(), Path(cache_dir)
    encoder = Encoder(tokenizer, rotate=options.rotate, today=options.today, end=options.end)
    stores: list[TokenStore] = []
    left = options.max_tokens
    for source in resolve_names(list(map(str, sources))):
        if left is not None and left <= 0:
            break
        if is_pack(source):
            store = open_pack(source, encoder.tokenizer, encoder.identity["tokenizer"], cache)
        elif is_binidx(source):
            store = _open_binidx(source, cache, progress)
        else:
            store = _tokenized(source, encoder, replace(options, max_tokens=left), cache, progress)
        if options.vocab_size is not None:
            store.check_vocab(options.vocab_size)
        if store.facts.get("kind tokens") and not options.trust_ids:
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
    options: ReadOptions | None = None,
    *,
    progress: Progress | None = None,
) -> TokenStore:
    """Tokenize sources into a new directory, see `write_pack`.

    Args:
        sources, tokenizer, options, progress: see `load_tokens`.
        out: the directory to create.

    Returns:
        The documents in that directory.

    Raises:
        UserError: bad data, an output that exists or cannot be written.
    """
    if out.exists():
        raise UserError(f"output {out} already exists", "name a new directory with --out")
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(scratch(out))
        except OSError as error:
            raise UserError(
                f"output {out} cannot be written ({error.strerror or error})", "name another directory with --out"
            ) from error
        store = load_tokens(sources, tokenizer, options, cache_dir=folder, progress=progress)
        meta = {
            "sources": [Path(source).name if Path(source).exists() else str(source) for source in sources],
            "tokenizer": tokenizer_hash(tokenizer),
            "tokenizer_name": Path(tokenizer.name_or_path).name,
        }
        write_pack(store, out, meta)
    return open_store(out, AGAIN)


def source_identity(source: str | Path) -> list:
    """Return JSON values that change when the source does, without reading it."""
    if str(source).startswith(HUB):
        return [str(source)]
    return stats_of(pair(source) if is_binidx(source) else source_files(source))


def _tokenized(
    source: str | Path, encoder: Encoder, options: ReadOptions, cache: Path, progress: Progress | None
) -> TokenStore:
    identity = {
        "source": source_identity(source),
        "text_column": options.text_column,
        "max_tokens": options.max_tokens,
        **encoder.identity,
    }
    name_skipped(source)
    entry = cache / entry_key(identity)
    if not is_whole(entry):
        with writing(entry) as unfinished, StoreWriter(unfinished) as writer:
            reader = DocumentReader(source, options.text_column, max_line_bytes=options.max_line_bytes)
            for document in (document for chunk in chunks(reader) for document in encoder(chunk)):
                writer.add(document)
                if options.vocab_size is not None:
                    check_vocab(writer.max_id, options.vocab_size)
                if progress is not None and writer.documents % CHUNK_DOCUMENTS == 0:
                    progress(writer.documents, writer.tokens)
                if options.max_tokens is not None and writer.tokens >= options.max_tokens:
                    break
            if not writer.documents:
                raise UserError(
                    f"the tokenizer finds no token in {source}", "check the data and that the tokenizer fits it"
                )
            if progress is not None:
                progress(writer.documents, writer.tokens)
            writer.finish(identity)
    return open_store(entry)


def _open_binidx(source: str | Path, cache: Path, progress: Progress | None) -> TokenStore:
    """Map the ids where they are; cache their hashes and the largest id."""
    tokens, offsets = read_binidx(source)
    entry = cache / f"{entry_key({'binidx': source_identity(source)})}.hashes"
    cached = _read_hashes(entry, len(offsets) - 1)
    if cached is None:
        hashes, max_id = scan(tokens, offsets, str(source), progress)
        content = hashes.tobytes() + max_id.to_bytes(8, "little")
        with writing(entry) as unfinished:
            unfinished.write_bytes(content + hashlib.sha256(content).digest())
    else:
        hashes, max_id = cached
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


def _read_hashes(entry: Path, documents: int) -> tuple[np.ndarray, int] | None:
    """Return hashes and the largest id from a file of uint64 with the SHA-256 of them at its end.

    None: it is not there, or damaged.
    """
    if not entry.is_file():
        return None
    content = entry.read_bytes()
    values, digest = content[:-32], content[-32:]
    if len(values) != 8 * (documents + 1) or hashlib.sha256(values).digest() != digest:
        log.warning("%s is damaged and is made again", entry)
        return None
    numbers = np.frombuffer(values, dtype=np.uint64)
    return numbers[:-1], int(numbers[-1])
