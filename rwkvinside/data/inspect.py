"""Tokenized data for people: the detected format of a source, its statistics as lines, some documents decoded.

Prints nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..support.text import rounded_bytes
from .binidx import is_binidx, pair, read_binidx
from .encode import agreement
from .readers import HUB, kind_of, source_files
from .statistics import Statistics
from .token_pack import is_pack
from .token_store import TokenStore

BAR = 40  # characters of the longest bar


@dataclass(frozen=True)
class Sample:
    """A decoded document.

    Attributes:
        number: of the document in the store, from 1 on.
        tokens, targets: how many it has.
        shown: how many of its tokens are decoded.
        runs: its text in runs, each with whether it is masked (carries no loss).
    """

    number: int
    tokens: int
    targets: int
    shown: int
    runs: list[tuple[str, bool]]


def source_format(source: str) -> str:
    """Return the detected format of a source, with its files and bytes."""
    if source.startswith(HUB):
        return "streamed by datasets, split train"
    if is_pack(source):
        files, kind = sorted(file for file in Path(source).iterdir() if file.is_file()), "packed tokens"
    elif is_binidx(source):
        files, kind = list(pair(source)), f"binidx, {read_binidx(source)[0].dtype}"
    else:
        files = source_files(source)
        kind = ", ".join(sorted({kind_of(file) or file.suffix.lower() for file in files}))
    count = f"{len(files)} files, " if len(files) > 1 else ""
    return f"{kind}, {count}{rounded_bytes(sum(file.stat().st_size for file in files))}"


def summary(
    store: TokenStore,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocab_size: int | None,
    seq_len: int,
    max_tokens: int,
) -> list[str]:
    """Return the statistics of a source, line by line.

    Args:
        store: its documents.
        tokenizer: that made or is to read its ids.
        vocab_size: rows of the teacher's embedding; None: only the tokenizer is known.
        seq_len: length of a row, for padding.
        max_tokens: limit with which the source was read; a store that reaches it is a beginning.
    """
    statistics = Statistics(store)
    documents, tokens = store.num_documents, store.num_tokens
    by_count = sorted(statistics.kinds.items(), key=lambda item: -item[1])
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in by_count)
    first = f" (the first {max_tokens:,} tokens)" if tokens >= max_tokens else ""
    if sum(statistics.kinds.values()) > documents:  # packed data and binidx are counted as a whole
        kinds = f"of {kinds}"
    packed, padded = statistics.padding(seq_len)
    cut, lost = statistics.cut(seq_len)
    median, longest = int(np.median(store.lengths)), int(store.lengths.max())
    lines = [
        f"documents   {documents:,}{first}: {kinds}",
        f"tokens      {tokens:,}, of which {statistics.targets:,} are targets ({statistics.targets / tokens:.1%})",
        f"vocabulary  {_vocabulary(statistics, len(tokenizer), vocab_size)}",
    ]
    if statistics.kinds.get("tokens"):
        lines.append(f"ids         {agreement(store, tokenizer):.1%} of a sample come back from decoding and encoding")
    if repeated := statistics.repeated:
        lines.append(f"repeated    {repeated:,} documents are equal to an earlier one ({repeated / documents:.1%})")
    original, trained = statistics.answers
    if original:
        lines.append(f"answers     given {_shares(original)}; trained on {_shares(trained)}")
    lines.append(
        f"padding     {packed:.2%} in packed rows of {seq_len}; {padded:.1%} in rows of whole ones (sft), "
        f"which cut {cut:,} documents and {lost / tokens:.1%} of the tokens"
    )
    lines.append(f"lengths     median {median:,}, longest {longest:,} tokens")
    classes = statistics.histogram()
    most = max(count for *_, count in classes)
    for shortest, last, count in classes:
        bar = "█" * round(BAR * count / most) or ("▏" if count else "")
        lines.append(f"{shortest:>11,} - {last:<9,} {count:>9,} {bar}".rstrip())
    return lines


def _vocabulary(statistics: Statistics, ids: int, vocab: int | None) -> str:
    """Return in words whether all ids can be looked up."""
    size, owner = (ids, "the tokenizer") if vocab is None else (vocab, "the teacher")
    over = statistics.oversized(size)
    if not over:
        return f"largest id {statistics.store.max_id:,}, {owner} has {size:,}"
    listed = ", ".join(map(str, sorted(over)[:5])) + (", ..." if len(over) > 5 else "")
    return f"{over.total():,} tokens have ids that {owner} ({size:,}) lacks: {listed}; a run refuses this data"


def _shares(counts: dict[str, int]) -> str:
    total = sum(counts.values())
    return " ".join(f"{letter} {count / total:.1%}" for letter, count in sorted(counts.items()))


def samples(store: TokenStore, tokenizer: PreTrainedTokenizerBase, count: int, most: int) -> Iterator[Sample]:
    """Decode some evenly spaced documents.

    Args:
        store, tokenizer: as in `summary`.
        count: documents to decode, at most.
        most: tokens of each to decode, from its beginning, at most.
    """
    for i in np.linspace(0, store.num_documents - 1, min(count, store.num_documents)).astype(int):
        ids, masked = store.piece(i)[0].tolist(), store.masked(i)
        runs = _runs(tokenizer, ids[:most], masked[:most])
        yield Sample(int(i) + 1, len(ids), int((~masked[1:]).sum()), min(most, len(ids)), runs)


def _runs(tokenizer: PreTrainedTokenizerBase, ids: list[int], masked: np.ndarray) -> list[tuple[str, bool]]:
    """Return the text in runs of masked and of other tokens."""
    ends = [*(np.flatnonzero(np.diff(masked)) + 1).tolist(), len(ids)]
    shown, runs = 0, []
    for end in ends:  # from the beginning each time: some tokenizers drop a space in front of what they decode
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        runs.append((text[shown:], bool(masked[end - 1])))
        shown = len(text)
    return runs
