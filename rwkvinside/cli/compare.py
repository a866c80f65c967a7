"""`rwkvinside compare RUN RUN ...`: runs beside each other, on the terminal and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .arguments import ArgumentParser, output_folder


def main(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Print a table and what differs, write page, CSV, LaTeX and figures.

    Raises:
        UserError: fewer than two runs, or one that cannot be read.
    """
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="two run directories or more")
    parser.add_argument(
        "--out", type=output_folder, default=Path("compare"), metavar="DIR", help="folder to write (default: compare)"
    )
    args = parser.parse(argv)
    from ..report.compare import compare_runs, write_comparison

    comparison, console = compare_runs(args.runs), Console(highlight=False)
    page, *others = write_comparison(comparison, args.out)
    _print(console, comparison.shown)
    if comparison.differences:
        _print(console, [["what differs", *comparison.runs], *([key, *row] for key, row in comparison.differences)])
    for text in comparison.warnings:
        console.print(f"warning: {text}", soft_wrap=True)
    console.print(f"wrote {page}, {', '.join(path.name for path in others[:2])} and {len(others[2:]) // 3} figures")
    return 0


def _print(console: Console, rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if i else "left", no_wrap=not i, overflow="fold")
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)
