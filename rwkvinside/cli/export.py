"""`rwkvinside export RUN --to FORMAT --out DIR`: a finished run in a format that other programs read."""

from __future__ import annotations

from collections.abc import Sequence

from ..export.registry import FORMATS, export
from .arguments import ArgumentParser

# passed to the format when given, which else uses its defaults
OPTIONS = ("dtype", "tie_embeddings", "adapters", "checkpoint")
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # as `precision` says it


def main(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Export, and print what was written."""
    _add_arguments(parser)
    args = parser.parse(argv)
    options = {name: value for name in OPTIONS if (value := getattr(args, name)) is not None}
    report = export(args.run, args.out, args.to, **options)
    from ..export.card import changes

    source = f"stage {report['stage']}, {report['checkpoint']}"
    print(f"wrote {args.out}: {source}, {report['parameters']} parameters, {report['dtype']}")
    for line in changes(report):
        print(line)
    return 0


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run directory")
    formats = "; ".join(f"{name}: {text}" for name, (_, text) in FORMATS.items())
    parser.add_argument("--to", default="hf", metavar="FORMAT", help=f"{formats} (default: hf)")
    parser.add_argument("--out", required=True, metavar="DIR|FILE", help="directory or file to create")
    parser.add_argument(
        "--dtype",
        type=lambda name: SHORT.get(name, name),
        choices=["float32", "bfloat16", "float16", "q8_0"],
        help="of the weights (default: the teacher's); q8_0, 8 bits: of gguf only",
    )
    tie = parser.add_mutually_exclusive_group()
    tie.add_argument(
        "--tie-embeddings",
        action="store_true",
        default=None,
        help="one matrix for embedding and head (default: where training has kept both equal)",
    )
    tie.add_argument(
        "--untie-embeddings", action="store_false", default=None, dest="tie_embeddings", help="two matrices for them"
    )
    parser.add_argument(
        "--checkpoint", metavar="best|last|step-N", help="of the last stage (default: the best on validation data)"
    )
    parser.add_argument(
        "--adapters",
        choices=["merge", "separate"],
        help="merge adapters into the weights (default), or keep them separate, as PEFT stores them",
    )
    parser.add_argument("--merge", action="store_const", const="merge", dest="adapters", help="as --adapters merge")
