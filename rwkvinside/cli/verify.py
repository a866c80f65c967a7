"""`rwkvinside verify DIR --against RUN`: the proof that an export computes the same as the run."""

from __future__ import annotations

from collections.abc import Sequence

from .arguments import ArgumentParser


def main(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Print what was compared and the differences."""
    parser.add_argument("export", metavar="DIR|FILE", help="what was exported")
    parser.add_argument("--against", required=True, metavar="RUN", help="run directory")
    args = parser.parse(argv)
    from ..export.registry import verify

    for name, value in verify(args.export, against=args.against).items():
        print(f"{name}: {value}")
    return 0
