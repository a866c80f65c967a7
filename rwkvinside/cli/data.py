"""`rwkvinside data`: inspect data, tokenize it once, store a teacher's logits for it, or write it."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import UserError
from ..support.text import rounded_bytes
from .arguments import (
    ArgumentParser,
    add_config_arguments,
    add_device_argument,
    add_drawing_arguments,
    add_reading_arguments,
    at_least,
    config_from,
    count,
    output_file,
    reading_options,
    run_command,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..data.inspect import Sample

COMMANDS = {
    "inspect": ("data:inspect", "what is in data: kinds, lengths, padding, masks, ids out of range, samples"),
    "generate": ("data:generate", "texts or conversations that a teacher writes itself, to train on"),
    "presets": ("data:presets", "published data that has a short name, with license and size"),
    "pack": ("data:pack", "tokenize data once, into a directory that can be trained on"),
    "logits": ("data:logits", "store the teacher's likeliest tokens for the rows of a stage, for teacher: cache"),
}


def main(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Run one of the commands."""
    return run_command(parser, argv, COMMANDS)


def generate(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Write texts or conversations to a .jsonl file.

    Raises:
        UserError: an input that cannot be used, an output that cannot be written; `Interrupted` by ctrl-C.
    """
    parser.add_argument("--teacher", required=True, metavar="NAME", help="who writes: preset, hub id or directory")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="file to write")
    parser.add_argument(
        "--tokens", type=count, default=1_000_000, metavar="N", help="to write in all, such as 600k (default: 1M)"
    )
    parser.add_argument("--plain", action="store_true", help="texts, even if the teacher has a chat template")
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="begin with these, one a line: beginnings of texts, or a user's turns",
    )
    parser.add_argument(
        "--max-tokens", type=count, default=512, metavar="N", help="of one text or answer (default: 512)"
    )
    parser.add_argument("--rows", type=at_least(1), default=16, metavar="N", help="texts at a time (default: 16)")
    add_drawing_arguments(parser, temperature=1.0, top_p=1.0)
    add_device_argument(parser, "where the teacher runs")
    args = parser.parse(argv)
    from ..conversion.generate import generate_text
    from ..teacher.sampling import Sampling

    sampling = Sampling(args.temperature, args.top_p, args.max_tokens, args.rows, args.seed)
    generate_text(
        args.teacher,
        args.out,
        args.tokens,
        sampling,
        plain=args.plain,
        prompts=args.prompts,
        device=args.device,
    )
    return 0


def presets(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Print a table of the data sets that have a short name."""
    parser.parse(argv)
    from ..data.catalog import CATALOG

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("--data", "size", "license", "what it is"):
        table.add_column(name, no_wrap=name != "what it is")
    for name, dataset in CATALOG.items():
        table.add_row(name, dataset.size, dataset.license, dataset.about)
    console = Console()
    console.print(table)
    console.print("read from the hub as they are needed; hub:NAME[:CONFIG] names any other data set there")
    return 0


def inspect(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Show what is in each source.

    Raises:
        UserError: a source or a tokenizer cannot be read.
    """
    _add_inspect_arguments(parser)
    args = parser.parse(argv)
    from ..data.inspect import samples, source_format, summary
    from ..data.sources import tokenizing_progress
    from ..data.tokenize import ReadOptions, load_tokens

    tokenizer, vocab_size = _tokenizer(args)
    # trust_ids: what a run would refuse is shown
    options = ReadOptions(**reading_options(args), trust_ids=True, max_tokens=args.max_tokens)
    console = Console(highlight=False, soft_wrap=True)
    lengths = {}
    with tempfile.TemporaryDirectory() as folder:
        for source in args.sources:
            with tokenizing_progress() as progress:
                store = load_tokens([source], tokenizer, options, cache_dir=folder, progress=progress)
            lengths[source] = store.lengths
            console.print(f"{source}: {source_format(source)}", style="bold")
            for line in summary(
                store, tokenizer, vocab_size=vocab_size, seq_len=args.seq_len, max_tokens=args.max_tokens
            ):
                console.print(f"  {line}")
            console.print()
            if args.samples and store.loss is not None:
                style = "dim" if console.is_terminal else "between ‹ and ›"
                console.print(f"  samples; what carries no loss is {style}\n")
            for sample in samples(store, tokenizer, args.samples, args.sample_tokens):
                _show_sample(console, sample)
    if args.png is not None:
        from ..report.figures import length_figure, save_figure

        save_figure(length_figure(lengths), args.png)
        console.print(f"lengths drawn in {args.png}")
    return 0


def pack(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Tokenize the sources into a directory and print what is in it.

    Raises:
        UserError: a source or a tokenizer cannot be read, the output exists or cannot be written.
    """
    _add_source_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to create")
    parser.add_argument("--max-tokens", type=count, metavar="N", help="stop after so many, such as 1B (default: all)")
    args = parser.parse(argv)
    from ..data import tokenize
    from ..data.sources import tokenizing_progress
    from ..data.statistics import Statistics

    tokenizer, vocab_size = _tokenizer(args)
    options = tokenize.ReadOptions(**reading_options(args), vocab_size=vocab_size, max_tokens=args.max_tokens)
    with tokenizing_progress() as progress:
        store = tokenize.pack(args.sources, args.out, tokenizer, options, progress=progress)
    size = sum(file.stat().st_size for file in args.out.iterdir())
    print(
        f"{args.out}: {store.num_documents:,} documents, {store.num_tokens:,} tokens, "
        f"{Statistics(store).targets:,} of them targets, {rounded_bytes(size)}"
    )
    print(f"train on it with --data {args.out}")
    return 0


def logits(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Write the missing logits of a stage."""
    add_config_arguments(parser, out="where to write them (default: the stage's teacher_cache)")
    parser.add_argument("--stage", default="distill", metavar="NAME", help="stage whose rows to use (default: distill)")
    parser.add_argument("--k", type=int, default=64, metavar="N", help="tokens to store per position (default: 64)")
    parser.add_argument(
        "--ranks", type=at_least(1), default=1, metavar="N", help="processes that are to train on them (default: 1)"
    )
    args = parser.parse(argv)
    config = config_from(args, args.stage)
    from ..conversion.write_logits import distillation_plan, write_logits

    plan = distillation_plan(config, args.stage, args.ranks)
    out = args.out or plan.settings.teacher_cache
    if out is None:
        hint = f"name a directory with --out, or stages.{args.stage}.teacher_cache"
        raise UserError("nowhere to write the logits to", hint)
    write_logits(plan, Path(out), args.k)
    return 0


def _add_source_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="file, directory, NAME.idx, hub:NAME[:CONFIG] or preset"
    )
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument(
        "--teacher", metavar="NAME", help="its tokenizer and vocabulary: preset, hub id or directory"
    )
    tokenizer.add_argument("--tokenizer", metavar="DIR", help="directory or hub id of a tokenizer alone")
    add_reading_arguments(parser)


def _add_inspect_arguments(parser: ArgumentParser) -> None:
    _add_source_arguments(parser)
    parser.add_argument(
        "--max-tokens", type=count, default=5_000_000, metavar="N", help="read so many of a source (default: 5M)"
    )
    parser.add_argument(
        "--seq-len",
        type=count,
        default=2048,
        metavar="N",
        help="tokens of a row, to say how much is padding (default: 2048)",
    )
    parser.add_argument("--samples", type=at_least(0), default=3, metavar="N", help="documents to show (default: 3)")
    parser.add_argument("--sample-tokens", type=count, default=200, metavar="N", help="to show of each (default: 200)")
    parser.add_argument("--png", type=output_file, metavar="FILE", help="draw the lengths of documents here")


def _tokenizer(args: argparse.Namespace) -> tuple[PreTrainedTokenizerBase, int | None]:
    """Return the tokenizer, and the teacher's vocabulary size if one is named."""
    from ..config.teacher_lookup import find_teacher
    from ..teacher.load import open_tokenizer
    from ..teacher.settings import TeacherConfig

    if args.tokenizer is not None:
        return open_tokenizer(TeacherConfig(path=args.tokenizer)), None
    teacher = find_teacher(args.teacher)
    return open_tokenizer(TeacherConfig(path=teacher.path)), teacher.vocab_size


def _show_sample(console: Console, sample: Sample) -> None:
    """Print a document; masked text is dim on a terminal, in brackets elsewhere."""
    rest = f", the first {sample.shown} of them" if sample.shown < sample.tokens else ""
    console.print(
        f"  document {sample.number:,}: {sample.tokens:,} tokens, {sample.targets:,} targets{rest}", style="bold"
    )
    text = Text()
    for run, masked in sample.runs:
        text.append(run if console.is_terminal or not masked else f"‹{run}›", style="dim" if masked else "")
    console.print(text)
    console.print()
