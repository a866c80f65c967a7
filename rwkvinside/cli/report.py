"""`rwkvinside report RUN`: draw what a run has measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .arguments import ArgumentParser


def main(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Write the PNGs and print their names."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the PNGs (default: the run directory)")
    args = parser.parse(argv)
    from ..report.write import write_report

    for path in write_report(args.run, args.out):
        print(f"wrote {path}")
    return 0
