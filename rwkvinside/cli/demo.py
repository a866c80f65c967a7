"""`rwkvinside demo`: the whole path on one small machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..errors import VerificationError
from .arguments import ArgumentParser


def main(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Run the demo.

    Raises:
        UserError: `--out` holds something else, or this Python has no sources.
        VerificationError: the export differs from the trained model, or (except with --quick) the student is further
            from its teacher than promised.
    """
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), metavar="DIR", help="folder for everything (default: demo)"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny version in seconds, to see that all parts work")
    args = parser.parse(argv)
    import torch
    from transformers.utils.logging import disable_progress_bar

    from ..demo.run import FULL, QUICK, Demo
    from ..demo.tables import MAX_CE_GAP

    disable_progress_bar()  # transformers' bars for loading weights
    # With matrices this small a second thread gives a factor of 1.5 on an idle machine but costs a factor of ten as
    # soon as anything else runs, because OpenMP's threads spin while they wait for one that has no core.
    torch.set_num_threads(1)
    demo = Demo(args.out, QUICK if args.quick else FULL, Console(highlight=False))
    result = demo.run()
    gap = result["stages"]["distill"]["ce"] - result["stages"]["distill"]["ce_teacher"]
    if not args.quick and gap > MAX_CE_GAP:
        raise VerificationError(
            f"the student's cross entropy is {gap:.3f} nats above its teacher's, allowed are {MAX_CE_GAP}"
        )
    return 0
