"""`rwkvinside verify DIR --against RUN`: the proof that an exported directory computes the same as the run."""

from __future__ import annotations

from collections.abc import Sequence

from .arguments import ArgumentParser


def main(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Print what was compared and the differences."""
    parser.add_argument("directory", metavar="DIR", help="exported directory")
    parser.add_argument("--against", required=True, metavar="RUN", help="run directory")
    args = parser.parse(argv)
    from ..export.verify import verify

    for name, value in verify(args.directory, against=args.against).items():
        print(f"{name}: {value}")
    return 0
