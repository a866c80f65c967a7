"""`rwkvinside data inspect` and `rwkvinside data pack`: look at data before training on it, tokenize it for good."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ..config.teacher_lookup import find_teacher
from ..data.binidx import is_binidx, pair, read_binidx
from ..data.encode import agreement, tokenizer_hash
from ..data.readers import HUB, source_files
from ..data.sources import tokenizing_progress
from ..data.statistics import Statistics
from ..data.token_pack import is_pack, write_pack
from ..data.token_store import TokenStore
from ..data.tokenize import load_tokens
from ..errors import UserError
from ..report.figures import length_figure, save_figure
from ..support.settings import parse_count
from ..support.text import rounded_bytes
from ..teacher.load import open_tokenizer
from ..teacher.settings import TeacherConfig
from .arguments import at_least

BAR = 40  # characters of the longest bar


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """The arguments of `rwkvinside data inspect` or `rwkvinside data pack`."""
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="file, directory, NAME.idx or hub:NAME[:CONFIG]")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--teacher", metavar="NAME", help="its tokenizer and vocabulary: preset, directory, hub id")
    tokenizer.add_argument("--tokenizer", metavar="DIR", help="directory or hub id of a tokenizer alone")
    parser.add_argument("--text-column", default="text", metavar="FIELD", help="field of the text (default: text)")
    parser.add_argument("--as-given", action="store_true", help="leave the options of questions in their order")
    if command == "pack":
        parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to be made")
        parser.add_argument("--max-tokens", type=_count, metavar="N", help="stop after so many tokens, such as 1B")
        return
    parser.add_argument(
        "--max-tokens", type=_count, default=5_000_000, metavar="N", help="read so many of a source (default: 5M)"
    )
    parser.add_argument(
        "--seq-len", type=_count, default=2048, metavar="N", help="length of a row, for padding (default: 2048)"
    )
    parser.add_argument("--samples", type=at_least(0), default=3, metavar="N", help="documents to show (default: 3)")
    parser.add_argument("--sample-tokens", type=_count, default=200, metavar="N", help="of each (default: 200)")
    parser.add_argument("--png", type=Path, metavar="OUT", help="draw the lengths here")


def inspect(args: argparse.Namespace) -> int:
    """Run `rwkvinside data inspect`; returns the exit code.

    Raises:
        UserError: a source or a tokenizer that cannot be read.
    """
    tokenizer, vocab = _tokenizer(args)
    console = Console(highlight=False, soft_wrap=True)
    lengths = {}
    with tempfile.TemporaryDirectory() as folder:
        for source in args.sources:
            with tokenizing_progress() as progress:
                store = load_tokens(
                    [source],
                    tokenizer,
                    cache_dir=folder,
                    text_column=args.text_column,
                    rotate=not args.as_given,
                    trust_ids=True,  # what a run would refuse is shown
                    max_tokens=args.max_tokens,
                    progress=progress,
                )
            lengths[source] = store.lengths
            console.print(f"{source}: {_format(source)}", style="bold")
            for line in _summary(store, tokenizer, vocab, args):
                console.print(f"  {line}")
            console.print()
            _show_samples(console, store, tokenizer, args.samples, args.sample_tokens)
    if args.png is not None:
        try:
            save_figure(length_figure(lengths), args.png)
        except OSError as error:
            raise UserError(f"{args.png} cannot be written ({error.strerror or error})", "name another file") from error
        console.print(f"lengths drawn in {args.png}")
    return 0


def pack(args: argparse.Namespace) -> int:
    """Run `rwkvinside data pack`; returns the exit code.

    Raises:
        UserError: a source or a tokenizer that cannot be read, an output that is there already or cannot be written.
    """
    if args.out.exists():
        raise UserError(f"output {args.out} exists already", "name a new directory with --out")
    tokenizer, vocab = _tokenizer(args)
    console = Console(highlight=False, soft_wrap=True)
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        cache = tempfile.TemporaryDirectory(prefix=f".{args.out.name}.", dir=args.out.parent)
    except OSError as error:
        raise UserError(
            f"output {args.out} cannot be written ({error.strerror or error})", "name another directory with --out"
        ) from error
    with cache as folder:
        with tokenizing_progress() as progress:
            store = load_tokens(
                args.sources,
                tokenizer,
                cache_dir=folder,
                vocab_size=vocab,
                text_column=args.text_column,
                rotate=not args.as_given,
                max_tokens=args.max_tokens,
                progress=progress,
            )
        meta = {
            "sources": [Path(source).name if Path(source).exists() else source for source in args.sources],
            "tokenizer": tokenizer_hash(tokenizer),
            "tokenizer_name": Path(tokenizer.name_or_path).name,
        }
        write_pack(store, args.out, meta)
    size = sum(file.stat().st_size for file in args.out.iterdir())
    console.print(
        f"{args.out}: {store.num_documents:,} documents, {store.num_tokens:,} tokens, "
        f"{Statistics(store).targets:,} of them targets, {rounded_bytes(size)}"
    )
    console.print(f"train on it with --data {args.out}")
    return 0


def _count(text: str) -> int:
    try:
        return parse_count(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number such as 600k, 5M or 4096") from error


def _tokenizer(args: argparse.Namespace) -> tuple[PreTrainedTokenizerBase, int | None]:
    """The tokenizer, and the rows of the teacher's embedding where a teacher is named."""
    if args.tokenizer is not None:
        return open_tokenizer(TeacherConfig(path=args.tokenizer)), None
    found = find_teacher(args.teacher)
    return open_tokenizer(TeacherConfig(path=found.path)), found.vocab_size


def _format(source: str) -> str:
    """What a source was taken for."""
    if source.startswith(HUB):
        return "streamed by datasets, split train"
    if is_pack(source):
        files, kind = sorted(file for file in Path(source).iterdir() if file.is_file()), "packed tokens"
    elif is_binidx(source):
        files, kind = list(pair(source)), f"binidx, {read_binidx(source)[0].dtype}"
    else:
        files = source_files(source)
        kind = ", ".join(sorted({file.suffix.lower() for file in files}))
    count = f"{len(files)} files, " if len(files) > 1 else ""
    return f"{kind}, {count}{rounded_bytes(sum(file.stat().st_size for file in files))}"


def _summary(
    store: TokenStore, tokenizer: PreTrainedTokenizerBase, vocab: int | None, args: argparse.Namespace
) -> list[str]:
    """Everything but the samples, line by line."""
    found = Statistics(store)
    documents, tokens = store.num_documents, store.num_tokens
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(found.kinds.items(), key=lambda item: -item[1]))
    first = f" (the first {args.max_tokens:,} tokens)" if tokens >= args.max_tokens else ""
    if sum(found.kinds.values()) > documents:  # packed data and binidx are counted as a whole
        kinds = f"of {kinds}"
    packed, padded = found.padding(args.seq_len)
    cut, lost = found.cut(args.seq_len)
    median, longest = int(np.median(store.lengths)), int(store.lengths.max())
    lines = [
        f"documents   {documents:,}{first}: {kinds}",
        f"tokens      {tokens:,}, of which {found.targets:,} are targets ({found.targets / tokens:.1%})",
        f"vocabulary  {_vocabulary(found, len(tokenizer), vocab)}",
    ]
    if found.kinds.get("tokens"):
        lines.append(f"ids         {agreement(store, tokenizer):.1%} of a sample come back from decoding and encoding")
    if found.repeated:
        lines.append(
            f"repeated    {found.repeated:,} documents are equal to an earlier one ({found.repeated / documents:.1%})"
        )
    given, trained = found.answers
    if given:
        lines.append(f"answers     given {_shares(given)}; trained on {_shares(trained)}")
    lines.append(
        f"padding     {packed:.2%} in packed rows of {args.seq_len}; {padded:.1%} with one document a row, "
        f"which cuts {cut:,} documents and {lost / tokens:.1%} of the tokens"
    )
    lines.append(f"lengths     median {median:,}, longest {longest:,} tokens")
    classes = found.histogram()
    most = max(count for *_, count in classes)
    for shortest, last, count in classes:
        bar = "█" * round(BAR * count / most) or ("▏" if count else "")
        lines.append(f"{shortest:>11,} - {last:<9,} {count:>9,} {bar}".rstrip())
    return lines


def _vocabulary(found: Statistics, ids: int, vocab: int | None) -> str:
    """Whether all ids can be looked up."""
    size, owner = (ids, "the tokenizer") if vocab is None else (vocab, "the teacher")
    over = found.oversized(size)
    if not over:
        return f"largest id {found.store.max_id:,}, {owner} has {size:,}"
    listed = ", ".join(map(str, sorted(over)[:5])) + (", ..." if len(over) > 5 else "")
    return f"{over.total():,} tokens have ids that {owner} ({size:,}) has not: {listed}; a run refuses this data"


def _shares(counts: dict[str, int]) -> str:
    total = sum(counts.values())
    return " ".join(f"{letter} {count / total:.1%}" for letter, count in sorted(counts.items()))


def _show_samples(
    console: Console, store: TokenStore, tokenizer: PreTrainedTokenizerBase, count: int, most: int
) -> None:
    """Some documents, evenly chosen, decoded; what carries no loss is dim on a terminal and in brackets elsewhere."""
    if count and store.loss is not None:
        style = "dim" if console.is_terminal else "between ‹ and ›"
        console.print(f"  samples; what carries no loss is {style}\n")
    for i in np.linspace(0, store.num_documents - 1, min(count, store.num_documents)).astype(int):
        ids, masked = store.piece(i)[0].tolist(), store.masked(i)
        rest = f", the first {most} of them" if len(ids) > most else ""
        console.print(
            f"  document {i + 1:,}: {len(ids):,} tokens, {int((~masked[1:]).sum()):,} targets{rest}", style="bold"
        )
        text = Text()
        for part, hidden in _runs(tokenizer, ids[:most], masked[:most]):
            text.append(part if console.is_terminal or not hidden else f"‹{part}›", style="dim" if hidden else "")
        console.print(text)
        console.print()


def _runs(tokenizer: PreTrainedTokenizerBase, ids: list[int], masked: np.ndarray) -> list[tuple[str, bool]]:
    """The text in runs of masked and other tokens. Decoded from the beginning each time: some tokenizers drop a space
    in front of what they decode."""
    ends = [*(np.flatnonzero(np.diff(masked)) + 1).tolist(), len(ids)]
    shown, runs = 0, []
    for end in ends:
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        runs.append((text[shown:], bool(masked[end - 1])))
        shown = len(text)
    return runs
