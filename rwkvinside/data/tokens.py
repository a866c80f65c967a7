"""From documents to token ids, once: the result is a TokenStore in a cache directory. Knows nothing of rows or order.

The name of a cache entry is a hash of the sources (path, size and modification time of each file), the tokenizer with
its chat template, and the options.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ..errors import UserError
from .chat import encode_conversation
from .readers import HUB, Document, read_documents, source_files
from .store import TokenStore, check_vocab, is_whole, open_store

FORMAT = 1
CHUNK_DOCUMENTS = 512
CHUNK_BYTES = 4 << 20

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
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> TokenStore:
    """Tokenise the documents of `sources`, or reuse what an earlier call with the same input left in `cache_dir`.

    A text becomes prefix + its tokens + suffix. By default these are what the tokenizer itself puts around a text,
    since this is what the teacher sees in use: <s> for Llama, nothing for Qwen. `add_bos`, `add_eos` force or forbid
    them. A text that begins with the prefix already (or ends with the suffix) does not get it twice. Conversations get
    exactly what the chat template writes.

    Args:
        sources: see `read_documents`; their documents follow one another.
        tokenizer: a Hugging Face tokenizer.
        cache_dir: directory of the cache, made if missing; several processes may use it at once.
        vocab_size: rows of the teacher's embedding; token ids beyond are refused.
        text_column: the field that holds the text.
        add_bos: True puts the tokenizer's bos token first, False nothing, None as above.
        add_eos: the same for eos at the end.
        max_tokens: stop after the document with which this many tokens are reached (for endless sources).
        progress: called with (documents, tokens) so far; not called when the cache is used.

    Raises:
        UserError: bad data (the line names file and line), ids beyond the vocabulary, a cache that cannot be written.
    """
    prefix, suffix = _special_ids(tokenizer, add_bos, add_eos)
    identity = {
        "format": FORMAT,
        "sources": [_source_identity(source) for source in sources],
        "tokenizer": _tokenizer_hash(tokenizer),
        "text_column": text_column,
        "prefix": prefix,
        "suffix": suffix,
        "max_tokens": max_tokens,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    entry = Path(cache_dir) / key
    if not is_whole(entry):
        documents = (document for source in sources for document in read_documents(source, text_column))
        encoded = _encode(documents, tokenizer, prefix, suffix)
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            unfinished = Path(tempfile.mkdtemp(prefix=f"{key}.unfinished-", dir=entry.parent))
            try:
                _write(unfinished, encoded, identity, vocab_size, max_tokens, progress)
                _publish(unfinished, entry)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
        except OSError as error:
            raise UserError(
                f"the token cache {str(entry.parent)!r} cannot be written ({error.strerror or error})",
                "free some space or choose another directory: data.cache_dir=DIR",
            ) from error
    store = open_store(entry)
    if vocab_size is not None:
        store.check_vocab(vocab_size)
    return store


def _special_ids(tokenizer, add_bos: bool | None, add_eos: bool | None) -> tuple[list[int], list[int]]:
    """The ids in front of and behind every text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    at = next((i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain), None)
    if at is None:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path!r} turns 'a' into {full}, which does not hold {plain}",
            "use a tokenizer that only adds tokens in front and behind",
        )
    prefix, suffix = full[:at], full[at + len(plain) :]
    wanted = []
    for name, own, choice in (("bos", prefix, add_bos), ("eos", suffix, add_eos)):
        token = getattr(tokenizer, f"{name}_token_id")
        if choice and token is None:
            raise UserError(f"add_{name} is true, but tokenizer {tokenizer.name_or_path!r} has no {name} token")
        wanted.append(own if choice is None else ([token] if choice else []))
    return wanted[0], wanted[1]


def _source_identity(source: str | Path) -> list:
    if str(source).startswith(HUB):
        return [str(source)]
    stats = [(file, file.stat()) for file in source_files(source)]
    return [[str(file.resolve()), stat.st_size, stat.st_mtime_ns] for file, stat in stats]


def _tokenizer_hash(tokenizer) -> str:
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        # Set by the last call of the tokenizer, not by its files.
        content.pop("truncation", None)
        content.pop("padding", None)
    else:
        options = {name: str(value) for name, value in tokenizer.init_kwargs.items()}
        content = [type(tokenizer).__name__, tokenizer.get_vocab(), options]
    text = json.dumps([content, tokenizer.chat_template], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _chunks(documents: Iterable[Document]) -> Iterator[list[tuple[Document, bytes]]]:
    """Lists of documents that are worth one call of the tokenizer."""
    chunk: list[tuple[Document, bytes]] = []
    size = 0
    for document in documents:
        content = document.as_bytes()
        chunk.append((document, content))
        size += len(content)
        if len(chunk) == CHUNK_DOCUMENTS or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encode(
    documents: Iterable[Document], tokenizer, prefix: list[int], suffix: list[int]
) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
    """(hash, ids, completion mask of a conversation or None) of each document."""
    for chunk in _chunks(documents):
        texts = [document.text for document, _ in chunk if document.text is not None]
        encoded = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else ())
        for document, content in chunk:
            completion = None
            if document.messages is not None:
                ids, completion = encode_conversation(tokenizer, document.messages, document.where)
            else:
                ids = next(encoded)
                if not ids:  # the tokenizer's normaliser dropped everything
                    continue
                if ids[: len(prefix)] != prefix:
                    ids = prefix + ids
                if suffix and ids[-len(suffix) :] != suffix:
                    ids = ids + suffix
            digest = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
            yield digest, np.array(ids, dtype=np.uint32), completion


def _write(
    directory: Path,
    encoded: Iterable[tuple[int, np.ndarray, np.ndarray | None]],
    identity: dict,
    vocab_size: int | None,
    max_tokens: int | None,
    progress: Progress | None,
) -> None:
    offsets, hashes = array("q", [0]), array("Q")
    conversations, max_id = 0, 0
    with (directory / "tokens.bin").open("wb") as tokens, (directory / "loss.bin").open("wb") as loss:
        for digest, ids, completion in encoded:
            max_id = max(max_id, int(ids.max()))
            if vocab_size is not None:
                check_vocab(max_id, vocab_size)
            tokens.write(ids.tobytes())
            loss.write((np.ones(len(ids), np.uint8) if completion is None else completion.astype(np.uint8)).tobytes())
            conversations += completion is not None
            offsets.append(offsets[-1] + len(ids))
            hashes.append(digest)
            if progress is not None and len(hashes) % CHUNK_DOCUMENTS == 0:
                progress(len(hashes), offsets[-1])
            if max_tokens is not None and offsets[-1] >= max_tokens:
                break
    if not hashes:
        raise UserError("the tokenizer finds no token in the data", "check the files and that the tokenizer fits them")
    if progress is not None:
        progress(len(hashes), offsets[-1])
    if not conversations:
        (directory / "loss.bin").unlink()
    np.save(directory / "offsets.npy", np.frombuffer(offsets, dtype=np.int64))
    np.save(directory / "hashes.npy", np.frombuffer(hashes, dtype=np.uint64))
    counts = {"documents": len(hashes), "conversations": conversations, "tokens": offsets[-1], "max_id": max_id}
    (directory / "meta.json").write_text(json.dumps(identity | counts, indent=1) + "\n", encoding="utf-8")


def _publish(unfinished: Path, entry: Path) -> None:
    """Rename into place; when another process was faster, its result is the same."""
    if entry.exists() and not is_whole(entry):
        shutil.rmtree(entry)
    try:
        os.rename(unfinished, entry)
    except OSError:
        if not is_whole(entry):
            raise
