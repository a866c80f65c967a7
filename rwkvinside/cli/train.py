"""`rwkvinside train`: a conversion, alone or under a launcher (deepspeed, torchrun)."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .arguments import ArgumentParser, add_config_arguments, config_from

if TYPE_CHECKING:
    from ..config.schema import Config


def main(parser: ArgumentParser, argv: Sequence[str], script: str | None = None) -> int:
    """Train, print the plan, or hand over to DeepSpeed's launcher.

    Args:
        parser: a new one.
        argv: the arguments.
        script: path of the calling script, which a launcher starts on every host; None is `python -m rwkvinside`.
    """
    add_config_arguments(parser)
    parser.add_argument("--stage", metavar="NAME", help="run this stage alone, continuing from the earlier stages")
    add_run_arguments(parser)
    args = parser.parse(argv)
    again = [*([script] if script else ["--module", "rwkvinside", "train"]), *argv]
    return run(config_from(args, args.stage), args, again)


def run(config: Config, args: argparse.Namespace, again: Sequence[str]) -> int:
    """Train as a configuration says, print the plan, or hand over to DeepSpeed's launcher.

    Args:
        config: of the run.
        args: of a parser with `add_run_arguments`; `stage`, where one can be chosen, and `ranks` of a dry run.
        again: what a launcher starts on every host: a script, or --module and its name, with arguments.
    """
    stage = getattr(args, "stage", None)
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    ranks, hosts = int(os.environ.get("WORLD_SIZE", "1")), {}
    if args.hostfile and not launched:
        from ..training.launch import check_hosts, launch, read_hostfile

        hosts = read_hostfile(args.hostfile)
        ranks = sum(hosts.values())
    if args.dry_run:
        from ..planning.fitting import resolve_fitted
        from ..planning.plan import plan_text

        plan = resolve_fitted(config, [stage] if stage else None, getattr(args, "ranks", None) or ranks)
        print(plan_text(plan, config), end="")
        return 0
    if hosts:
        check_hosts(hosts)
        launch(args.hostfile, again)
    from ..conversion.run import train

    train(
        config,
        stage=stage,
        resume=args.resume,
        resume_from=args.resume_from,
        allow_changes=args.allow_changes,
        launched=launched,
    )
    return 0


def add_run_arguments(parser: ArgumentParser) -> None:
    """Add the arguments that say how a run begins or goes on, see `run`."""
    parser.add_argument("--resume", action="store_true", help="continue the run in the output directory")
    parser.add_argument(
        "--resume-from",
        "--resume_from",
        metavar="STEP",
        help="continue from this checkpoint, for instance step-00000150",
    )
    parser.add_argument(
        "--allow-changes",
        "--allow_changes",
        action="store_true",
        help="go on with other settings than the run has had so far",
    )
    parser.add_argument(
        "--hostfile", metavar="FILE", help="start on several machines with DeepSpeed's launcher, once all answer"
    )
    parser.add_argument(
        "--dry-run", "--dry_run", action="store_true", help="print the plan; load no weights and write nothing"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # set by the launcher
