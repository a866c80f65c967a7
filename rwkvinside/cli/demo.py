"""`rwkvinside demo`: the whole path on one small machine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..errors import UserError, VerificationError
from .arguments import ArgumentParser


def main(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Run the demo.

    Raises:
        UserError: `--out` holds something else, or this Python has no sources.
        VerificationError: the export differs from the trained model, or (except with --quick) the student is further
            from its teacher than promised.
    """
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for everything (default: demo, with --teacher demo-llm)"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny version in seconds, to see that all parts work")
    parser.add_argument(
        "--teacher",
        metavar="NAME",
        help="convert this model, with a window: preset, hub id or directory (default: train a small one, then convert "
        "that)",
    )
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="SOURCE",
        help="texts for --teacher (default: what it writes itself)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="with --teacher: any field of its conversion")
    args = parser.parse(argv)
    if args.teacher is not None:
        return _llm(args)
    if args.data or args.overrides:
        raise UserError("--data and key=value are for a teacher of yours", "name it with --teacher")
    import torch

    from ..demo.run import FULL, QUICK, Demo
    from ..demo.tables import MAX_CE_GAP
    from ..support.quiet import quiet_libraries

    quiet_libraries()
    # With matrices this small a second thread gives a factor of 1.5 on an idle machine but costs a factor of ten as
    # soon as anything else runs, because OpenMP's threads spin while they wait for one that has no core.
    torch.set_num_threads(1)
    demo = Demo(args.out or Path("demo"), QUICK if args.quick else FULL, Console(highlight=False))
    result = demo.run()
    gap = result["stages"]["distill"]["ce"] - result["stages"]["distill"]["ce_teacher"]
    if not args.quick and gap > MAX_CE_GAP:
        raise VerificationError(
            f"the student's cross entropy is {gap:.3f} nats above its teacher's, allowed are {MAX_CE_GAP}"
        )
    return 0


def _llm(args: argparse.Namespace) -> int:
    """Convert a language model; with --quick as little of it as possible."""
    from ..demo.llm import FULL, QUICK, LlmDemo
    from ..support.quiet import quiet_libraries

    quiet_libraries()
    settings = QUICK if args.quick else FULL
    out = args.out or Path("demo-llm")
    LlmDemo(out, args.teacher, args.data, args.overrides, settings, Console(highlight=False)).run()
    return 0
