"""Arguments that several verbs share. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..config.schema import Config


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
    from ..config.load import load_config

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
