"""`rwkvinside eval DIR_OR_RUN --teacher DIR --data FILE`: measure, show a table, write JSON and a picture."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from ..support.files import write_json
from .arguments import (
    ArgumentParser,
    add_device_argument,
    add_output_arguments,
    add_reading_arguments,
    at_least,
    check_parts,
    count,
    model_name,
    reading_options,
)
from .evaluation_tables import new_table, show_recall, show_tasks, show_writing

# an option says how something is measured: it needs one of those that ask for it
PARTS = {
    "max_documents": ("data",),
    "max_length": ("data",),
    **dict.fromkeys(("lengths", "depths", "samples"), ("recall",)),
    "write_tokens": ("write", "ask", "begin"),
    **dict.fromkeys(("task_dir", "limit", "cache"), ("tasks",)),
}
CONTROL = "the teacher, untrained, its attention cut to the windows of the student"

if TYPE_CHECKING:
    from ..evaluate.compare import Measures
    from ..evaluate.quality import Evaluation, Scores


def main(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Compare the two models and show how far apart they are.

    Raises:
        UserError: a directory that is neither a model nor a run, data that cannot be read, an output that cannot be
            written.
    """
    parser.add_argument("student", type=Path, metavar="DIR_OR_RUN", help="exported model or run directory")
    parser.add_argument(
        "--teacher",
        type=model_name,
        metavar="NAME",
        help="preset, hub id or directory (default: the one that a run names)",
    )
    parser.add_argument(
        "--data", action="append", default=[], metavar="FILE", help="texts to compare on, token by token; may repeat"
    )
    add_reading_arguments(parser, of_run=True)
    parser.add_argument(
        "--max-documents", type=at_least(1), metavar="N", help="compare the first N alone (default: all)"
    )
    parser.add_argument(
        "--max-length",
        type=at_least(1),
        metavar="N",
        help="tokens of a document to compare (default: the teacher's context, at most 4096)",
    )
    _add_recall_arguments(parser)
    _add_task_arguments(parser)
    add_output_arguments(parser, png="perplexity and KL by position, and recall by length and depth,")
    add_device_argument(parser, "where the models run")
    parser.epilog = "At least one of --data, --recall, --ask, --begin and --tasks is needed."
    args = parser.parse(argv)
    from ..evaluate.compare import evaluate_saved
    from ..evaluate.samples import show_samples

    console = Console()
    comparison = evaluate_saved(
        args.student, args.teacher, _measures(args), device=args.device, notes=Console(stderr=True)
    )
    for result, show in (
        (comparison.evaluation, partial(_show, alone=comparison.teacher is None)),
        (comparison.writing, show_writing),
        (comparison.recall, show_recall),
        (comparison.tasks, show_tasks),
        (comparison.samples, show_samples),
    ):
        if result is not None:
            show(result, console)
    result = comparison.to_dict()
    if args.json is not None:
        write_json(args.json, result)
    if args.png is not None:
        from ..report.evaluation import evaluation_figure
        from ..report.figures import save_figure

        save_figure(evaluation_figure(result), args.png)
    return 0


def _add_recall_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("recall and generation")
    group.add_argument(
        "--recall",
        action="store_true",
        help="what is found again in long texts: a pass key, values of pairs; with --data a needle in them",
    )
    group.add_argument(
        "--lengths",
        type=_counts,
        metavar="N,...",
        help="of --recall: tokens of a text (default: 256,1024)",
    )
    group.add_argument(
        "--depths",
        type=at_least(1),
        metavar="N",
        help="of --recall: places of what is to be found (default: 5)",
    )
    group.add_argument(
        "--samples",
        type=at_least(1),
        metavar="N",
        help="of --recall: texts per length and place (default: 8)",
    )
    group.add_argument(
        "--write", type=at_least(1), metavar="N", help="compare what both models write after N beginnings of --data"
    )
    group.add_argument("--ask", metavar="TEXT", help="show what both models answer, in the teacher's chat template")
    group.add_argument("--begin", metavar="TEXT", help="show how both models go on from a beginning")
    group.add_argument("--write-tokens", type=at_least(1), metavar="N", help="tokens of what is written (default: 128)")


def _add_task_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("tasks of lm-evaluation-harness (pip install lm-eval)")
    group.add_argument("--tasks", type=_names, default=(), metavar="NAME,...", help="such as lambada_openai,arc_easy")
    group.add_argument("--task-dir", type=Path, metavar="DIR", help="YAML files that define more tasks")
    group.add_argument("--limit", type=at_least(1), metavar="N", help="examples of a task, at most (default: all)")
    group.add_argument("--cache", type=Path, metavar="DIR", help="keep answers here, so that a teacher gives them once")


def _counts(text: str) -> tuple[int, ...]:
    return tuple(sorted({count(part) for part in text.split(",")}))


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(filter(None, text.split(","))))


def _measures(args: argparse.Namespace) -> Measures:
    """Return what the arguments ask for.

    Raises:
        UserError: an option of something that is not asked for.
    """
    from ..evaluate.compare import Measures, Tasks, Writing
    from ..evaluate.recall import RecallPlan
    from ..evaluate.samples import Prompts

    check_parts(args, PARTS)
    said = args.ask is not None or args.begin is not None
    written = args.write_tokens or 128
    return Measures(
        data=tuple(args.data),
        max_documents=args.max_documents,
        max_length=args.max_length,
        reading=reading_options(args),
        recall=RecallPlan(args.lengths or (256, 1024), args.depths or 5, args.samples or 8) if args.recall else None,
        writing=None if args.write is None else Writing(args.write, written),
        tasks=Tasks(args.tasks, args.task_dir, args.limit, args.cache) if args.tasks else None,
        prompts=Prompts(args.ask, args.begin, written) if said else None,
    )


def _show(evaluation: Evaluation, console: Console, alone: bool = False) -> None:
    """Print the table: all tokens, then by position; of a model without a teacher what is its own."""
    title = f"{evaluation.documents:,} documents, {evaluation.scores.tokens:,} tokens, "
    title += f"{evaluation.shared_vocab:,} {'' if alone else 'shared '}ids; nats"
    if alone:  # a narrow table, which would wrap it
        console.print(title, highlight=False)
    table = new_table(None if alone else title)
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


def _nats(value: float) -> str:
    """Return four significant digits or so, in six characters: the table has to fit 80 columns."""
    return f"{value:.4f}" if value < 10 else f"{value:.2f}"


def _cells(scores: Scores, shown: Sequence[int]) -> list[str]:
    cells = (
        f"{scores.tokens:,}",
        _nats(scores.kl),
        _nats(scores.ce),
        _nats(scores.ce_teacher),
        f"{scores.perplexity:.4g}",
        f"{scores.perplexity_teacher:.4g}",
        f"{scores.agreement:.2%}",
    )
    return [cells[i] for i in shown]
