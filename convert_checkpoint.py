"""A trained run as a Hugging Face model directory, and the proof that it computes the same.

python convert_checkpoint.py export RUN --to hf --out DIR
python convert_checkpoint.py verify DIR --against RUN
"""

import argparse
import sys

from rwkvinside.errors import report_errors


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser(
        "export", help="write the last finished stage of a run in another format, and verify it"
    )
    export.add_argument("run", metavar="RUN", help="run directory")
    export.add_argument("--to", choices=["hf"], default="hf", help="format (hf: Hugging Face transformers)")
    export.add_argument("--out", required=True, metavar="DIR", help="directory to create")
    export.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights (default: the teacher's)"
    )
    tie = export.add_mutually_exclusive_group()
    tie.add_argument("--tie-embeddings", action="store_true", default=None, help="one matrix for embedding and head")
    tie.add_argument("--untie-embeddings", action="store_false", dest="tie_embeddings", help="two matrices")
    export.add_argument(
        "--adapters",
        choices=["merge", "separate"],
        default="merge",
        help="merge adapters into the weights (default), or keep them apart, as PEFT stores them",
    )
    export.add_argument("--merge", action="store_const", const="merge", dest="adapters", help="as --adapters merge")
    verify = commands.add_parser("verify", help="compare an exported directory with the run it was made from")
    verify.add_argument("directory", metavar="DIR", help="exported directory")
    verify.add_argument("--against", required=True, metavar="RUN", help="run directory")
    return parser.parse_args(argv)


@report_errors
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.command == "export":
        from rwkvinside.export.card import changes
        from rwkvinside.export.huggingface import export_hf

        report = export_hf(
            args.run, args.out, dtype=args.dtype, tie_embeddings=args.tie_embeddings, adapters=args.adapters
        )
        print(f"wrote {args.out}: stage {report['stage']}, {report['parameters']} parameters, {report['dtype']}")
        for line in changes(report):
            print(line)
        return 0
    from rwkvinside.export.verify import verify

    for name, value in verify(args.directory, against=args.against).items():
        print(f"{name}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
