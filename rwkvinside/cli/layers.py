"""`rwkvinside layers`: which layers should keep attention, measured on a run or on a teacher."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from .arguments import ArgumentParser, add_data_arguments, at_least, count


def main(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Print the scores of all layers and the best choice; write RUN/layers.json and RUN/layers.png."""
    parser.add_argument("words", nargs="*", metavar="RUN", help="run directory; with --teacher: settings key=value")
    parser.add_argument("--keep", type=at_least(1), required=True, metavar="N", help="how many layers keep attention")
    parser.add_argument(
        "--choose",
        default="restore",
        metavar="METHOD",
        help="error, restore, swap or greedy (docs/layers.md; default: restore)",
    )
    parser.add_argument(
        "--distill",
        type=count,
        metavar="N",
        help="with restore: train each candidate on so many tokens first, at most (default: on none)",
    )
    parser.add_argument(
        "--max-gap", type=at_least(1), metavar="N", help="RWKV layers in a row, at most (default: any number)"
    )
    parser.add_argument(
        "--max-run", type=at_least(1), metavar="N", help="attention layers in a row, at most (default: any)"
    )
    parser.add_argument(
        "--tokens",
        type=count,
        default=64_000,
        metavar="N",
        help="of the validation data that are read, at most (default: 64k)",
    )
    parser.add_argument(
        "--teacher",
        metavar="NAME",
        help="in place of RUN: calibrate a student of this preset, hub id or directory, in a new run in --out",
    )
    add_data_arguments(parser, "with --teacher: texts to calibrate on")
    parser.add_argument("--out", type=Path, metavar="DIR", help="with --teacher: the new run")
    args = parser.parse(argv)
    run = _run(args)
    from ..conversion.choose import layers_of_run

    wanted = {name: getattr(args, name) for name in ("choose", "keep", "max_gap", "max_run", "distill")}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    if args.teacher is not None:
        _calibrate(args, run, wanted)
    kept, scores = layers_of_run(run, wanted, args.tokens)
    columns = {"score": scores.layers, **scores.details}
    print(f"{'layer':>5}" + "".join(f"{name:>12}" for name in columns))
    for i in range(len(scores.layers)):
        numbers = "".join(f"{values[i]:>12.4g}" for values in columns.values())
        print(f"{i:>5}{numbers}{'  keeps attention' if i in kept else ''}")
    base = "" if scores.base is None else f"KL {scores.base:.4g} with RWKV in all layers, "
    print(f"{base}on {scores.tokens:,} tokens; {run / 'layers.json'}, {run / 'layers.png'}")
    print(f"student.attention_layers=[{','.join(map(str, kept))}]")
    return 0


def _calibrate(args: argparse.Namespace, run: Path, wanted: dict) -> None:
    """Make the run of a teacher whose layers are to be chosen, unless they cannot be."""
    from ..config.load import load_config
    from ..config.teacher_lookup import find_teacher
    from ..conversion.choose import measured_choice
    from ..conversion.run import train

    overrides = [*args.words, "run=[calibrate]"]
    config = load_config(teacher=args.teacher, data=args.data, val=args.val, out=str(run), overrides=overrides)
    teacher = find_teacher(config.teacher.path, revision=config.teacher.revision, fields=config.teacher.config)
    measured_choice(wanted, teacher.num_layers)
    train(config)


def _run(args: argparse.Namespace) -> Path:
    """Return the run that is measured, which is still to be made where a teacher is given."""
    runs = [word for word in args.words if "=" not in word]
    if len(runs) != (args.teacher is None):
        raise UserError(
            "give one run, or a teacher", "rwkvinside layers RUN --keep 9, or --teacher NAME --data ... --out DIR"
        )
    if args.teacher is None and (args.data or args.val or args.out or len(args.words) > 1):
        raise UserError("--data, --val, --out and settings are for --teacher", "a run has its own")
    if args.teacher is not None and args.out is None:
        raise UserError("--teacher needs --out", "name a directory for the run that is calibrated")
    return args.out or Path(runs[0])
