"""The `rwkvinside` command: a table of verbs, each imported when it is chosen."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from ..errors import report_errors
from .arguments import add_config_arguments, at_least, config_from


def _plan(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="rwkvinside plan", description="Show what a run would do; load no weights.")
    add_config_arguments(parser)
    parser.add_argument(
        "--ranks", type=at_least(1), default=1, metavar="N", help="processes that share the work (default: 1)"
    )
    args = parser.parse_intermixed_args(argv)
    config = config_from(args)

    from ..config.resolve import resolve
    from ..planning.plan import plan_text

    print(plan_text(resolve(config, ranks=args.ranks), config), end="")
    return 0


def _config(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="rwkvinside config", description="Configurations.")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="print the configuration with all defaults filled in, as YAML")
    add_config_arguments(show)
    commands.add_parser("fields", help="list every field with its default and meaning")
    # subparsers cannot mix options and positionals: the first word chooses, the rest is parsed on its own
    if argv[:1] == ["show"]:
        from ..config.show import to_yaml

        print(to_yaml(config_from(show.parse_intermixed_args(argv[1:]))), end="")
        return 0
    parser.parse_args(argv)
    from ..config.show import describe

    for path, default, description in describe():
        print(f"{path} [{default}]: {description}" if default else f"{path}: {description}")
    return 0


def _doctor(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="rwkvinside doctor", description="Check what this machine offers.")
    parser.parse_args(argv)
    from .doctor import main

    return main()


def _eval(argv: Sequence[str]) -> int:
    from .eval import add_eval_arguments, main

    parser = argparse.ArgumentParser(prog="rwkvinside eval", description="Compare a student with its teacher on text.")
    add_eval_arguments(parser)
    return main(parser.parse_args(argv))


def _report(argv: Sequence[str]) -> int:
    from .report import add_report_arguments, main

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
        "training": "align and distill beside plain fine-tuning of the same teacher",
        "head": "memory and time of the distillation loss, all logits at once beside a chunk at a time",
    }
    parser, parsers = _group("bench", "Speed, measured side by side.", about)
    if argv[:1] == ["wkv7"]:
        from ..kernels.bench.command import add_arguments, main
    elif argv[:1] == ["training"]:
        from ..bench.training import add_arguments, main
    elif argv[:1] == ["head"]:
        from ..bench.distillation_loss import add_arguments, main
    else:
        parser.parse_args(argv)  # --help, or a complaint
    add_arguments(parsers[argv[0]])
    return main(parser.parse_args(argv))


def _data(argv: Sequence[str]) -> int:
    about = {
        "inspect": "what is in data: kinds, lengths, padding, masks, ids out of range, samples",
        "pack": "tokenize data once, into a directory that can be trained on",
        "logits": "the teacher's likeliest tokens for the rows of a stage, for teacher: cache",
    }
    parser, parsers = _group("data", "Data: look at it, pack it, write down what a teacher makes of it.", about)
    if argv[:1] == ["logits"]:
        from ..conversion.write_logits import add_arguments, main

        add_arguments(parsers["logits"])
        # subparsers cannot mix options and positionals: the first word chooses, the rest is parsed on its own
        return main(parsers["logits"].parse_intermixed_args(argv[1:]))
    if argv[:1] not in (["inspect"], ["pack"]):
        parser.parse_args(argv)  # --help, or a complaint
    from .data import add_arguments, inspect, pack

    add_arguments(parsers[argv[0]], argv[0])
    args = parsers[argv[0]].parse_intermixed_args(argv[1:])
    return (inspect if argv[0] == "inspect" else pack)(args)


def _demo(argv: Sequence[str]) -> int:
    from .demo import add_demo_arguments, main

    description = "The whole path on this machine: from a tiny teacher to a hybrid that generates."
    parser = argparse.ArgumentParser(prog="rwkvinside demo", description=description)
    add_demo_arguments(parser)
    return main(parser.parse_args(argv))


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "plan": (_plan, "what a run would do, without loading weights"),
    "config": (_config, "show the configuration that results, list all fields"),
    "doctor": (_doctor, "what this machine and installation offer"),
    "eval": (_eval, "compare a student with its teacher on text"),
    "data": (_data, "look at data, tokenize it for good, store the teacher's logits"),
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
