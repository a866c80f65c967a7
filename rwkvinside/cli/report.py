"""`rwkvinside report RUN`: a page of what a run has measured, and its figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .arguments import ArgumentParser, output_folder


def main(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Write the page and the figures and print their names."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument(
        "--out", type=output_folder, metavar="DIR", help="folder to write into (default: the run directory)"
    )
    parser.add_argument(
        "--eval",
        type=Path,
        metavar="FILE",
        help="JSON of `rwkvinside eval`, for scores by position (default: RUN/eval.json)",
    )
    args = parser.parse(argv)
    from ..report.write import write_report

    page, overview, *figures = write_report(args.run, args.out, args.eval)
    print(f"wrote {page}")
    print(f"wrote {overview}")
    print(f"wrote {len(figures) // 3} figures as SVG and PDF, with CSV, in {figures[0].parent}")
    return 0
