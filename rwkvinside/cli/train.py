"""`rwkvinside train`: a conversion, alone or under a launcher (deepspeed, torchrun)."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CONTINUE, Interrupted, UserError
from ..training.stop_signal import sigterm_interrupts
from .arguments import ArgumentParser, add_config_arguments, add_plan_arguments, check_parts, config_from

if TYPE_CHECKING:
    from ..config.schema import Config

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what deepspeed and torchrun set


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
    stage = ["--stage", args.stage] if args.stage else []
    return run(
        args, lambda: _configuration(args), again, lambda config: [parser.prog, "--out", config.out, *stage, "--resume"]
    )


def _configuration(args: argparse.Namespace) -> Config:
    """Return what arguments ask for; where a run is to go on and they name nothing to convert, what the run has.

    Raises:
        UserError: lists all problems; there is no such run.
    """
    resumes = args.resume or args.resume_from
    if not resumes or args.out is None or args.config or args.teacher or args.recipe or args.variant:
        return config_from(args, args.stage)
    from ..runs.directory import RunDirectory

    return config_from(args, args.stage, base=[RunDirectory(args.out).config()])


def run(
    args: argparse.Namespace,
    configure: Callable[[], Config],
    again: Sequence[str],
    resuming: Callable[[Config], Sequence[str]],
) -> int:
    """Train as a configuration says, print the plan, or hand over to DeepSpeed's launcher.

    Args:
        args: of a parser with `add_run_arguments`; `stage`, where one can be chosen.
        configure: gives the configuration.
        again: what a launcher starts on every host: a script, or --module and its name, with arguments.
        resuming: gives the words of the command that goes on with a run of this configuration.
    """
    config = None
    check_parts(args, {"ranks": ["dry_run"], "gpu": ["dry_run"]})
    with sigterm_interrupts():
        try:
            config = configure()
            return _train(args, config, again)
        except Interrupted as error:
            raise Interrupted(error.cause, _continue(config and resuming(config))) from error
        except KeyboardInterrupt as error:
            if not (args.resume or args.resume_from):
                raise
            cause = "stopped before the run went on: nothing of it was changed"
            raise Interrupted(cause, _continue(config and resuming(config))) from error


def _continue(command: Sequence[str] | None) -> str:
    """Return the advice to go on with a command, of which the launcher that started this process is not known."""
    if command is None:
        return CONTINUE
    program = shlex.split(command[0])
    if "RANK" in os.environ:
        return f"continue under the launcher with {shlex.join([*program, *command[1:]])}"
    python = ["python"] if program[0].endswith(".py") else []
    return f"continue with {shlex.join([*python, *program, *command[1:]])}"


def _train(args: argparse.Namespace, config: Config, again: Sequence[str]) -> int:
    stage = getattr(args, "stage", None)
    started, ranks = _launched()
    hosts: dict[str, int] = {}
    if args.hostfile and not started:
        from ..training.launch import check_hosts, launch, read_hostfile

        hosts = read_hostfile(args.hostfile)
        ranks = sum(hosts.values())
    # alone, a process needs DeepSpeed for little, and has CUDA graphs without it
    launched = bool(started or hosts) and (ranks > 1 or config.deepspeed.helps_one_process)
    if args.dry_run:
        from ..planning.fitting import resolve_fitted
        from ..planning.plan import plan_text

        chosen = [stage] if stage else None
        plan = resolve_fitted(config, chosen, args.ranks or ranks, launched=launched, gpu=args.gpu)
        print(plan_text(plan, config, args.gpu), end="")
        return 0
    if hosts:
        check_hosts(hosts)
        launch(args.hostfile, again)
    from ..conversion.run import train

    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere) if args.quiet else nullcontext():
        train(
            config,
            stage=stage,
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


def _launched() -> tuple[bool, int]:
    """Return whether a launcher has started this process, and how many of its kind.

    Raises:
        UserError: its variables are not what a launcher sets.
    """
    given = {name: os.environ[name] for name in LAUNCHER if name in os.environ}
    for name in {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"} & given.keys():
        if not re.fullmatch("[0-9]{1,9}", given[name]) or (name == "WORLD_SIZE" and int(given[name]) == 0):
            raise UserError(f"the environment has {name}={given[name]!r}, which no launcher sets", f"unset {name}")
    launched = "RANK" in given and "WORLD_SIZE" in given
    if launched and int(given["RANK"]) >= int(given["WORLD_SIZE"]):
        raise UserError(f"the environment has RANK={given['RANK']} of WORLD_SIZE={given['WORLD_SIZE']}", "unset both")
    if launched and (missing := [name for name in LAUNCHER if name not in given]):
        raise UserError(
            f"the environment has RANK and WORLD_SIZE, as of a launcher, but no {' and no '.join(missing)}",
            "start with deepspeed or torchrun, or unset the two",
        )
    return launched, int(given.get("WORLD_SIZE", "1"))


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
        "-q", "--quiet", action="store_true", help="print the end of the run and what is wrong, no more"
    )
    parser.add_argument(
        "--dry-run", "--dry_run", action="store_true", help="print the plan; load no weights and write nothing"
    )
    add_plan_arguments(parser, "with --dry-run: ")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # set by the launcher
