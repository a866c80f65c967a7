"""`rwkvinside lm`: language models that are processed by their state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..support.files import write_json
from ..support.progress import Progress
from ..support.text import rounded_bytes, spans
from .arguments import ArgumentParser, add_device_argument, add_output_arguments, at_least, run_command

if TYPE_CHECKING:
    from ..lm.state_report import CompressionCost, Growth

COMMANDS = {
    "evaluate": ("lm:evaluate", "long texts read whole and in chunks, with the state and without it"),
    "state": ("lm:state", "bytes of the state by layer, whether they grow, and what compressing it costs"),
}


def main(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Run one of the commands."""
    return run_command(parser, argv, COMMANDS)


def evaluate(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Measure a model on long texts, print tables, write JSON.

    Raises:
        UserError: a model or data that cannot be read, no document longer than a chunk.
    """
    _add_model(parser)
    parser.add_argument("--data", action="append", required=True, metavar="FILE", help="texts to read; may repeat")
    parser.add_argument(
        "--chunk-size", type=at_least(1), default=1024, metavar="N", help="tokens of a chunk (default: 1024)"
    )
    _add_limits(parser, chunks=4)
    add_output_arguments(parser)
    args = parser.parse(argv)
    from ..lm.evaluation import CHUNKS, evaluate_documents
    from ..lm.load import load_documents, load_model

    model, tokenizer = load_model(args.model, args.device, Console(stderr=True))
    length = args.max_length or CHUNKS * args.chunk_size
    documents = load_documents(args.data, tokenizer, length, args.max_documents)
    with Progress("reading", unit="tokens") as progress:
        result = evaluate_documents(model, documents, args.chunk_size, progress)
    _show_evaluation(result, Console())
    if args.json is not None:
        write_json(args.json, result)
    return 0


def state(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Measure a model's state, print tables, write JSON.

    Raises:
        UserError: a model or data that cannot be read, no document longer than a chunk.
    """
    _add_model(parser)
    parser.add_argument(
        "--tokens",
        type=at_least(1),
        default=1024,
        metavar="N",
        help="bytes are those after N and after 4 N tokens (default: 1024)",
    )
    parser.add_argument(
        "--data",
        action="append",
        metavar="FILE",
        help="texts to measure compression on; may repeat (default: none is measured)",
    )
    parser.add_argument(
        "--chunk-size", type=at_least(1), default=256, metavar="N", help="tokens between compressions (default: 256)"
    )
    _add_limits(parser, chunks=16)
    add_output_arguments(parser)
    args = parser.parse(argv)
    from ..lm.load import load_documents, load_model
    from ..lm.session import StatefulModel
    from ..lm.state_report import compression_cost, state_growth

    model, tokenizer = load_model(args.model, args.device, Console(stderr=True))
    stateful = StatefulModel(model)
    growth, costs = state_growth(stateful, args.tokens), []
    _show_growth(growth, Console())
    if args.data:
        documents = load_documents(args.data, tokenizer, args.max_length or 16 * args.chunk_size, args.max_documents)
        with Progress("compressing", unit="tokens") as progress:
            costs = compression_cost(stateful, documents, chunk_size=args.chunk_size, progress=progress)
        _show_costs(costs, args.chunk_size, Console())
    if args.json is not None:
        write_json(args.json, {"growth": growth.to_dict(), "compression": [vars(cost) for cost in costs]})
    return 0


def _add_model(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="DIR_OR_RUN", help="exported model or run directory")


def _add_limits(parser: ArgumentParser, chunks: int) -> None:
    parser.add_argument(
        "--max-length",
        type=at_least(2),
        metavar="N",
        help=f"tokens of a document that are read (default: {chunks} times --chunk-size)",
    )
    parser.add_argument(
        "--max-documents", type=at_least(1), default=8, metavar="N", help="read the first N documents (default: 8)"
    )
    add_device_argument(parser, "where the model runs")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="", box=SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    return table


def _show_evaluation(result: dict, console: Console) -> None:
    table = _table(
        f"{result['documents']:,} documents, {result['tokens']:,} tokens; means of a document",
        *("read", "perplexity", "latency", "peak memory", "speed", "memory"),
    )
    full = result["full_processing_latency_ms"], result["full_processing_peak_bytes"]
    table.add_row("whole", f"{result['full_processing_perplexity']:.4f}", _milliseconds(full[0]), _bytes(full[1]))
    for way in result["chunked_processing_results"]:
        table.add_row(
            f"chunks of {way['chunk_size']:,}",
            f"{way['perplexity']:.4f}",
            _milliseconds(way["latency_ms"]),
            _bytes(way["peak_bytes"]),
            f"{way['speed_ratio']:.2f} x",
            "" if way["memory_ratio"] is None else f"{way['memory_ratio']:.2f} x",
            style="bold" if way["chunk_size"] == result["chunk_size"] else "",
        )
    console.print(table)
    console.print(
        f"after the first {result['chunk_size']:,} tokens: perplexity {result['with_state_perplexity']:.4f} with the "
        f"state, {result['without_state_perplexity']:.4f} without it ({result['state_benefit_ratio']:.3f} x)",
        highlight=False,
    )
    table = _table("by position", "tokens read", "tokens", "CE", "perplexity")
    for bucket in result["by_position"]:
        place = f"{bucket['first']:,}-{bucket['last']:,}"
        table.add_row(place, f"{bucket['tokens']:,}", f"{bucket['ce']:.4f}", f"{bucket['perplexity']:.4g}")
    console.print(table)


def _show_growth(growth: Growth, console: Console) -> None:
    tokens = growth.tokens
    table = _table("bytes of the state of one row", "layer", "", f"after {tokens:,}", f"after {4 * tokens:,}", "")
    kinds = {"recurrent": "RWKV state", "window": "window beside it", "attention": "keys and values"}
    for short, long in zip(growth.short, growth.long, strict=True):
        for kind, text in kinds.items():
            sizes = getattr(short, kind), getattr(long, kind)
            if sizes[1]:
                verdict = "grows" if sizes[1] > sizes[0] else "constant"
                table.add_row(str(short.layer), text, *(f"{size:,}" for size in sizes), verdict)
    totals = [sum(layer.total for layer in layers) for layers in (growth.short, growth.long)]
    table.add_row("all", "", *(f"{size:,}" for size in totals), "grows" if growth.grows else "constant", style="bold")
    console.print(table)
    if growth.grows:
        console.print(
            f"memory grows with the text: layers {spans(growth.grows)} hold keys and values of more and more tokens",
            highlight=False,
        )


def _show_costs(costs: list[CompressionCost], chunk_size: int, console: Console) -> None:
    title = (
        f"the state compressed and restored every {chunk_size:,} tokens, {costs[0].tokens:,} tokens predicted from it"
    )
    table = _table(title, "format", "bytes", "of the state", "KL, nats a token", "agreement")
    for cost in costs:
        table.add_row(cost.format, f"{cost.bytes:,}", f"{cost.ratio:.3f} x", f"{cost.kl:.2e}", f"{cost.agreement:.2%}")
    console.print(table)


def _milliseconds(value: float) -> str:
    return f"{value:,.1f} ms"


def _bytes(number: int | None) -> str:
    return "not measured" if number is None else rounded_bytes(number)
