"""`rwkvinside report RUN`: draw what a run has measured."""

import argparse
from pathlib import Path

from rich.console import Console

from ..report.write import write_report


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `rwkvinside report`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the PNGs (default: the run directory)")


def main(args: argparse.Namespace) -> int:
    """Write the PNGs and name them."""
    console = Console()
    for path in write_report(args.run, args.out):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    return 0
