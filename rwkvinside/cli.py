"""The `rwkvinside` command, and what all commands share: configuration arguments and how errors are shown.

Imports nothing heavy: each command brings in what it needs when it is chosen.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .errors import UserError

if TYPE_CHECKING:
    from .config import Config


def report_errors(main: Callable[..., int]) -> Callable[..., int]:
    """A main function whose `UserError` becomes a line of cause and a line of cure on stderr, and its exit code.

    Under a launcher, which sets RANK, only the first process speaks: all have found the same.
    """

    @functools.wraps(main)
    def reporting(argv: list[str] | None = None) -> int:
        try:
            return main(argv)
        except UserError as error:
            if os.environ.get("RANK", "0") == "0":
                print(f"error: {error.cause}", file=sys.stderr)
                if error.cure:
                    print(error.cure, file=sys.stderr)
            return error.exit_code

    return reporting


def at_least(lowest: int) -> Callable[[str], int]:
    """A `type` of arguments: whole numbers that are not below `lowest`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {lowest} on")
        return int(text)

    return parse


def add_config_arguments(parser: argparse.ArgumentParser, out: str = "run directory") -> None:
    """The arguments that together make a configuration; `config_from` reads them. `out` is what --out is said to be."""
    parser.add_argument("-c", "--config", action="append", default=[], metavar="FILE", help="YAML file; may repeat")
    parser.add_argument("--teacher", metavar="NAME", help="preset such as Qwen3-14B, hub id or local directory")
    parser.add_argument("--variant", action="append", default=[], metavar="NAME", help="such as one-card; may repeat")
    parser.add_argument("--data", action="append", default=[], metavar="PATH", help="file or directory; may repeat")
    parser.add_argument("--val", action="append", default=[], metavar="PATH", help="the same, to validate on")
    parser.add_argument("--out", metavar="DIR", help=out)
    parser.add_argument("--deepspeed", metavar="FILE", help="DeepSpeed's own configuration (JSON), used by launchers")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any field, as in stages.align.tokens=600k")


def config_from(args: argparse.Namespace, stage: str | None = None) -> Config:
    """The checked configuration that the arguments of `add_config_arguments` ask for.

    Args:
        stage: see `load_config`.

    Raises:
        UserError: with all problems found.
    """
    from .loading import load_config

    return load_config(
        args.config,
        teacher=args.teacher,
        variant=args.variant,
        data=args.data,
        val=args.val,
        out=args.out,
        deepspeed=args.deepspeed,
        stage=stage,
        overrides=args.overrides,
    )


def _plan(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="rwkvinside plan", description="Show what a run would do; load no weights.")
    add_config_arguments(parser)
    parser.add_argument(
        "--ranks", type=at_least(1), default=1, metavar="N", help="processes that share the work (default: 1)"
    )
    args = parser.parse_intermixed_args(argv)
    config = config_from(args)

    from .plan import plan_text

    print(plan_text(config, ranks=args.ranks), end="")
    return 0


def _config(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="rwkvinside config", description="Configurations.")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="print the configuration with all defaults filled in, as YAML")
    add_config_arguments(show)
    commands.add_parser("fields", help="list every field with its default and meaning")
    # subparsers cannot mix options and positionals: the first word chooses, the rest is parsed on its own
    if argv[:1] == ["show"]:
        from .loading import to_yaml

        print(to_yaml(config_from(show.parse_intermixed_args(argv[1:]))), end="")
        return 0
    parser.parse_args(argv)
    from .config import describe

    for path, default, description in describe():
        print(f"{path} [{default}]: {description}" if default else f"{path}: {description}")
    return 0


def _doctor(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="rwkvinside doctor", description="Check what this machine offers.")
    parser.parse_args(argv)
    from .doctor import main

    return main()


def _eval(argv: Sequence[str]) -> int:
    from .evaluate.command import add_eval_arguments, main

    parser = argparse.ArgumentParser(prog="rwkvinside eval", description="Compare a student with its teacher on text.")
    add_eval_arguments(parser)
    return main(parser.parse_args(argv))


def _report(argv: Sequence[str]) -> int:
    from .report.command import add_report_arguments, main

    parser = argparse.ArgumentParser(prog="rwkvinside report", description="Draw what a run has measured.")
    add_report_arguments(parser)
    return main(parser.parse_args(argv))


def _group(
    name: str, description: str, about: dict[str, str]
) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of a command with commands of its own, and theirs by name."""
    parser = argparse.ArgumentParser(prog=f"rwkvinside {name}", description=description)
    commands = parser.add_subparsers(dest="what", required=True)
    return parser, {each: commands.add_parser(each, help=text, description=text) for each, text in about.items()}


def _bench(argv: Sequence[str]) -> int:
    about = {
        "wkv7": "the recurrence: our kernels beside others and attention",
        "training": "align and distil beside plain fine-tuning of the same teacher",
        "head": "memory and time of the distillation loss, all logits at once beside a chunk at a time",
    }
    parser, parsers = _group("bench", "Speed, measured side by side.", about)
    if argv[:1] == ["wkv7"]:
        from .kernels.bench.command import add_arguments, main
    elif argv[:1] == ["training"]:
        from .evaluate.training_speed import add_arguments, main
    elif argv[:1] == ["head"]:
        from .evaluate.head_cost import add_arguments, main
    else:
        parser.parse_args(argv)  # --help, or a complaint
    add_arguments(parsers[argv[0]])
    return main(parser.parse_args(argv))


def _data(argv: Sequence[str]) -> int:
    about = {
        "inspect": "what is in data: kinds, lengths, padding, masks, ids out of range, samples",
        "pack": "tokenise data once, into a directory that can be trained on",
        "logits": "the teacher's likeliest tokens for the rows of a stage, for teacher: cache",
    }
    parser, parsers = _group("data", "Data: look at it, pack it, write down what a teacher makes of it.", about)
    if argv[:1] == ["logits"]:
        from .logits import add_arguments, main

        add_arguments(parsers["logits"])
        # subparsers cannot mix options and positionals: the first word chooses, the rest is parsed on its own
        return main(parsers["logits"].parse_intermixed_args(argv[1:]))
    if argv[:1] not in (["inspect"], ["pack"]):
        parser.parse_args(argv)  # --help, or a complaint
    from .data_command import add_arguments, inspect, pack

    add_arguments(parsers[argv[0]], argv[0])
    args = parsers[argv[0]].parse_intermixed_args(argv[1:])
    return (inspect if argv[0] == "inspect" else pack)(args)


def _demo(argv: Sequence[str]) -> int:
    from .demo import main

    return main(argv)


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "plan": (_plan, "what a run would do, without loading weights"),
    "config": (_config, "show the configuration that results, list all fields"),
    "doctor": (_doctor, "what this machine and installation offer"),
    "eval": (_eval, "compare a student with its teacher on text"),
    "data": (_data, "look at data, tokenise it for good, store the teacher's logits"),
    "report": (_report, "plots of a run"),
    "bench": (_bench, "speed of the kernels, and of training beside plain fine-tuning"),
    "demo": (_demo, "the whole path on this machine, from a tiny teacher to a hybrid that generates"),
}


@report_errors
def main(argv: list[str] | None = None) -> int:
    """Entry point of the `rwkvinside` command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    listing = "\n".join(f"  {name:<8} {text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="rwkvinside",
        description="RWKV-7 hybrids from transformers. Training: train_distill.py; export: convert_checkpoint.py.",
        epilog=f"commands:\n{listing}\n\nrwkvinside COMMAND --help says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    args = parser.parse_args(argv[:1])
    run, _ = COMMANDS[args.command]
    return run(argv[1:])
