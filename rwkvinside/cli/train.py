"""`rwkvinside train`: a conversion, alone or under a launcher (deepspeed, torchrun)."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

from .arguments import ArgumentParser, add_config_arguments, config_from


def main(parser: ArgumentParser, argv: Sequence[str], script: str | None = None) -> int:
    """Train, print the plan, or hand over to DeepSpeed's launcher.

    Args:
        parser: a new one.
        argv: the arguments.
        script: path of the calling script, which a launcher starts on every host; None is `python -m rwkvinside`.
    """
    _add_arguments(parser)
    args = parser.parse(argv)
    config = config_from(args, args.stage)
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    ranks, hosts = int(os.environ.get("WORLD_SIZE", "1")), {}
    if args.hostfile and not launched:
        from ..training.launch import check_hosts, launch, read_hostfile

        hosts = read_hostfile(args.hostfile)
        ranks = sum(hosts.values())
    if args.dry_run:
        from ..planning.fitting import resolve_fitted
        from ..planning.plan import plan_text

        plan = resolve_fitted(config, [args.stage] if args.stage else None, ranks)
        print(plan_text(plan, config), end="")
        return 0
    if hosts:
        check_hosts(hosts)
        launch(args.hostfile, [*([script] if script else ["--module", "rwkvinside", "train"]), *argv])
    from ..conversion.run import train

    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere) if args.quiet else nullcontext():
        train(
            config,
            stage=args.stage,
            resume=args.resume,
            resume_from=args.resume_from,
            allow_changes=args.allow_changes,
            launched=launched,
        )
    if os.environ.get("RANK", "0") == "0":
        from ..report.facts import run_facts
        from ..report.screen import end_screen

        print(end_screen(run_facts(Path(config.out))), end="")
    return 0


def _add_arguments(parser: ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--stage", metavar="NAME", help="run this stage alone, continuing from the earlier stages")
    parser.add_argument("--resume", action="store_true", help="continue the run in the output directory")
    parser.add_argument(
        "--resume-from", metavar="STEP", help="continue from this checkpoint, for instance step-00000150"
    )
    parser.add_argument(
        "--allow-changes", action="store_true", help="go on with other settings than the run has had so far"
    )
    parser.add_argument(
        "--hostfile", metavar="FILE", help="start on several machines with DeepSpeed's launcher, once all answer"
    )
    parser.add_argument(
        "-q", "--quiet", action="store_true", help="print the end of the run and what is wrong, no more"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan; load no weights and write nothing")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # set by the launcher
