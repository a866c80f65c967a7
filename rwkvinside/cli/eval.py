"""`rwkvinside eval DIR_OR_RUN --teacher DIR --data FILE`: measure, show a table, write JSON and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..support.files import write_json
from .arguments import ArgumentParser, add_output_arguments, at_least

CONTROL = "the teacher, untrained, its attention cut to the windows of the student"

if TYPE_CHECKING:
    from ..evaluate.quality import Evaluation, Scores


def main(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Compare the two models and show how far apart they are.

    Raises:
        UserError: a directory that is neither a model nor a run, data that cannot be read, an output that cannot be
            written.
    """
    parser.add_argument("student", type=Path, metavar="DIR_OR_RUN", help="exported model or run directory")
    parser.add_argument("--teacher", metavar="DIR", help="directory or hub id (default: the one a run names)")
    parser.add_argument(
        "--data", action="append", required=True, metavar="FILE", help="texts to compare on; may repeat"
    )
    add_output_arguments(parser, png="perplexity and KL by position")
    parser.add_argument("--max-documents", type=at_least(1), metavar="N", help="evaluate the first N documents only")
    parser.add_argument(
        "--max-length", type=at_least(1), metavar="N", help="tokens of a document to evaluate (default: at most 4096)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the models run")
    args = parser.parse(argv)
    from ..evaluate.compare import evaluate_saved

    comparison = evaluate_saved(
        args.student,
        args.teacher,
        args.data,
        max_documents=args.max_documents,
        max_length=args.max_length,
        device=args.device,
        notes=Console(stderr=True),
    )
    _show(comparison.evaluation, Console(), alone=comparison.teacher is None)
    result = comparison.to_dict()
    if args.json is not None:
        write_json(args.json, result)
    if args.png is not None:
        from ..report.figures import position_figure, save_figure

        save_figure(position_figure(result), args.png)
    return 0


def _show(evaluation: Evaluation, console: Console, alone: bool) -> None:
    """Print the table: all tokens, then by position; of a model without a teacher what is its own."""
    title = f"{evaluation.documents:,} documents, {evaluation.scores.tokens:,} tokens, "
    title += f"{evaluation.shared_vocab:,} {'' if alone else 'shared '}ids; nats"
    if alone:  # a narrow table, which would wrap it
        console.print(title, highlight=False)
    table = Table(title=None if alone else title, title_justify="left", title_style="", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("tokens\nread", justify="right", no_wrap=True)
    names = ("\ntokens", "\nKL", "\nCE", "CE\nteacher", "\nppl", "ppl\nteacher", "\nagreement")
    shown = [i for i, name in enumerate(names) if not alone or name in ("\ntokens", "\nCE", "\nppl")]
    for name in (names[i] for i in shown):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("all", *_cells(evaluation.scores, shown), style="bold", end_section=evaluation.control is None)
    if evaluation.control is not None:
        table.add_row("control", *_cells(evaluation.control, shown), end_section=True)
    for first, last, scores in evaluation.by_position:
        table.add_row(str(first) if first == last else f"{first}-{last}", *_cells(scores, shown))
    console.print(table)
    if evaluation.control is not None:
        console.print(f"control: {CONTROL}")


def _cells(scores: Scores, shown: Sequence[int]) -> list[str]:
    cells = (
        f"{scores.tokens:,}",
        f"{scores.kl:.4f}",
        f"{scores.ce:.4f}",
        f"{scores.ce_teacher:.4f}",
        f"{scores.perplexity:.4g}",
        f"{scores.perplexity_teacher:.4g}",
        f"{scores.agreement:.2%}",
    )
    return [cells[i] for i in shown]
