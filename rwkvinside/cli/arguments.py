"""What all verbs share: one parser class, the choice of a command, common arguments.

Imports nothing heavy, so that help and errors appear at once.
"""

from __future__ import annotations

import argparse
import os
from argparse import SUPPRESS
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib import import_module
from pathlib import Path
from textwrap import fill, wrap
from typing import TYPE_CHECKING, Any, NoReturn

from ..data.defaults import DATE, MAX_LINE_BYTES
from ..errors import UserError
from ..support.system import NO_MPS
from ..support.text import did_you_mean, short_count

if TYPE_CHECKING:
    from ..config.schema import Config
    from ..teacher.sampling import Sampling


MOST, LONGEST = 2**31, 20  # whole numbers of arguments are below, and looked at for so many digits


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help that does not break flags and names at their hyphens."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return wrap(text, width, break_on_hyphens=False)


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser that raises `UserError` and lets flags and positionals mix.

    Args:
        prog: the command as it is typed.
        description: at the top of its help.

    Attributes:
        commands: those that `run_command` chooses from, None for a command that has none below it.
    """

    commands: Mapping[str, tuple[str, str]] | None = None

    def __init__(self, prog: str, description: str):
        super().__init__(prog, description=description, formatter_class=_Help)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse all of `argv`, flags and positionals in any order.

        Raises:
            UserError: an unknown flag (names the nearest known one), or any other error of argparse.
        """
        flags = self._option_string_actions
        for word in argv:
            name = word.partition("=")[0]
            if name.startswith("--") and not any(flag.startswith(name) for flag in flags):
                shown = [flag[2:] for flag, action in flags.items() if flag[:2] == "--" and action.help != SUPPRESS]
                raise UserError(f"unknown flag {name}{did_you_mean(name[2:], shown, prefix='--')}", self._hint)
        return self.parse_intermixed_args(argv)

    def error(self, message: str) -> NoReturn:
        """Raise the error instead of printing the usage and exiting."""
        raise UserError(message, self._hint)

    @property
    def _hint(self) -> str:
        return f"see {self.prog} --help"


def run_command(parser: ArgumentParser, argv: Sequence[str], commands: Mapping[str, tuple[str, str]]) -> int:
    """Run the command that `argv` begins with; without one, parse it (--help).

    Args:
        parser: of what comes before the command.
        argv: arguments, beginning with the command.
        commands: name -> ("module:function", one line of help); the module is one of this package, imported when it is
            chosen, and the function takes a new parser and the arguments after the name.

    Returns:
        The exit code.

    Raises:
        UserError: no command, or an unknown one (names the nearest).
    """
    parser.commands = commands
    width = max(map(len, commands))
    indent = " " * (width + 4)
    listing = "\n".join(
        fill(f"  {name:<{width}}  {text}", 79, subsequent_indent=indent) for name, (_, text) in commands.items()
    )
    parser.epilog = f"commands:\n{listing}\n\n{parser.prog} COMMAND --help says more."
    hint = f"commands: {', '.join(commands)}"
    if not argv or argv[0].startswith("-"):
        parser.usage = f"{parser.prog} COMMAND ..."
        parser.parse(argv)
        raise UserError(f"{parser.prog} needs a command", hint)
    name, *rest = argv
    if name not in commands:
        raise UserError(f"{parser.prog} has no command {name!r}{did_you_mean(name, commands)}", hint)
    target, text = commands[name]
    module, function = target.split(":")
    run = getattr(import_module(f".{module}", __package__), function)
    return run(ArgumentParser(f"{parser.prog} {name}", fill(f"{text[:1].upper()}{text[1:]}.", 79)), rest)


def at_least(lowest: int) -> Callable[[str], int]:
    """Return an argument type: whole numbers from `lowest` on."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not lowest <= int(text[:LONGEST]) < MOST:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {lowest}")
        return int(text)

    return parse


def count(text: str) -> int:
    """Parse a number of tokens such as 600k, 5M or 4096 (an argument type)."""
    from ..support.settings import parse_count

    try:
        return parse_count(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number such as 600k, 5M or 4096") from error


def day(text: str) -> str:
    """Parse a day as YYYY-MM-DD (an argument type)."""
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a day such as {DATE}") from error


def add_reading_arguments(parser: ArgumentParser, of_run: bool = False) -> None:
    """Add how data is read, see `reading_options`.

    Args:
        parser: to be extended.
        of_run: what is not given is as the run has it.
    """

    def otherwise(usual: str) -> str:
        return "default: " + "the run's, else " * of_run + usual

    parser.add_argument("--text-column", metavar="FIELD", help=f"field that holds the text ({otherwise('text')})")
    parser.add_argument(
        "--max-line-bytes",
        type=count,
        metavar="N",
        help=f"refuse longer lines of files ({otherwise(short_count(MAX_LINE_BYTES))})",
    )
    parser.add_argument(
        "--today", type=day, metavar="DAY", help=f"the day that chat templates see, YYYY-MM-DD ({otherwise(DATE)})"
    )
    parser.add_argument(
        "--as-given",
        action="store_true",
        help="multiple choice: each question once, its options in their order (default: every rotation of them)",
    )


def reading_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of `ReadOptions` that were given."""
    given = {name: getattr(args, name) for name in ("text_column", "max_line_bytes", "today")}
    fields = {name: value for name, value in given.items() if value is not None}
    return fields | ({"rotate": False} if args.as_given else {})


def model_name(text: str) -> str:
    """Resolve a preset, hub id or directory to where the weights are (an argument type).

    Raises:
        UserError: there is no such model.
    """
    from ..config.teacher_lookup import teacher_path

    return teacher_path(text)


def output_file(text: str) -> Path:
    """Check before the work that an output can be written (an argument type).

    Raises:
        UserError: its folder does not exist or is not writable, or it is itself a folder.
    """
    path = Path(text)
    if not path.parent.is_dir():
        raise UserError(f"folder {path.parent} of the output {path.name} does not exist", "create it first")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"output {path} cannot be written", "name another file")
    return path


def output_folder(text: str) -> Path:
    """Check before the work that a folder can be written into or created (an argument type).

    Raises:
        UserError: it is a file, or lies in one or where nothing can be created.
    """
    path = Path(text)
    there = next(one for one in (path, *path.absolute().parents) if os.path.exists(one))
    if not there.is_dir():
        raise UserError(f"output {path} is {'' if there == path else 'in '}a file", "name a folder")
    if not os.access(there, os.W_OK):
        raise UserError(f"output {path} cannot be written", "name another folder")
    return path


def add_output_arguments(parser: ArgumentParser, png: str | None = None, json: str = "the numbers") -> None:
    """Add --json for what a command has found and, if `png` says what it draws, --png."""
    parser.add_argument("--json", type=output_file, metavar="FILE", help=f"write {json} here")
    if png is not None:
        parser.add_argument("--png", type=output_file, metavar="FILE", help=f"draw {png} here")


def number(text: str) -> float:
    """Parse a number (an argument type)."""
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from error


def add_device_argument(parser: ArgumentParser, text: str, default: str = "auto") -> None:
    """Add --device.

    Args:
        parser: to be extended.
        text: what runs there.
        default: "auto", the first GPU if there is one; else there is no such choice.
    """

    def device(name: str) -> str:
        if name == "mps":
            raise argparse.ArgumentTypeError(f"{name}: {NO_MPS}")
        return name

    choices = ("auto", "cpu", "cuda") if default == "auto" else ("cpu", "cuda")
    what = f"{text} (default: {'a GPU if there is one' if default == 'auto' else default})"
    parser.add_argument("--device", type=device, choices=choices, default=default, help=what)


def add_sampling_arguments(parser: ArgumentParser) -> None:
    """Add how a model writes, and where it runs, see `sampling_of`."""
    parser.add_argument("--plain", action="store_true", help="continue texts, even if there is a chat template")
    parser.add_argument("--max-tokens", type=count, default=512, metavar="N", help="of one reply (default: 512)")
    add_drawing_arguments(parser, temperature=0.7, top_p=0.95)
    add_device_argument(parser, "where the model runs")


def add_drawing_arguments(parser: ArgumentParser, *, temperature: float, top_p: float) -> None:
    """Add how tokens are drawn; the arguments are defaults."""
    parser.add_argument(
        "--temperature",
        type=number,
        default=temperature,
        metavar="T",
        help=f"of what is drawn; 0: always the likeliest token (default: {temperature:g})",
    )
    parser.add_argument(
        "--top-p",
        type=number,
        default=top_p,
        metavar="P",
        help=f"draw from the likeliest tokens that have this probability together (default: {top_p:g})",
    )
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="of what is drawn (default: 0)")


def sampling_of(args: argparse.Namespace, rows: int = 1) -> Sampling:
    """Return how parsed arguments ask a model to write.

    Args:
        args: of a parser with `add_sampling_arguments`.
        rows: texts at a time.

    Raises:
        UserError: a value out of its range.
    """
    from ..teacher.sampling import Sampling

    return Sampling(args.temperature, args.top_p, args.max_tokens, rows, args.seed)


def check_parts(args: argparse.Namespace, parts: Mapping[str, Sequence[str]]) -> None:
    """Refuse options that change nothing without others.

    Args:
        args: parsed; what was not given is None.
        parts: the options, each with those of which one has to be given; names as in `args`.

    Raises:
        UserError: names the first of them.
    """
    for name, asking in parts.items():
        if getattr(args, name) is not None and not any(getattr(args, each) for each in asking):
            option, *others = (f"--{each.replace('_', '-')}" for each in (name, *asking))
            raise UserError(f"{option} changes nothing without {' or '.join(others)}", "give both, or neither")


def add_plan_arguments(parser: ArgumentParser, condition: str = "") -> None:
    """Add --ranks and --gpu, what a plan is made for; `condition` begins their help."""
    parser.add_argument(
        "--ranks",
        type=at_least(1),
        metavar="N",
        help=f"{condition}processes, one a GPU, that share the work (default: 1)",
    )
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help=f"{condition}plan for this one, such as H100 or A100-40GB (default: this machine)",
    )


def add_config_arguments(
    parser: ArgumentParser, out: str = "run directory (default: runs/NAME of the teacher)"
) -> None:
    """Add the arguments of a configuration, see `config_from`.

    Args:
        parser: to be extended.
        out: help of --out.
    """
    parser.add_argument(
        "-c", "--config", action="append", default=[], metavar="FILE", help="YAML file of settings; may repeat"
    )
    parser.add_argument(
        "--teacher", metavar="NAME", help="what is converted: preset (such as Qwen3-14B), hub id or directory"
    )
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="how: radlads, hxa079, halo, simultaneous, windowed (docs/recipes.md; default: none of them)",
    )
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="NAME",
        help="fit it to a machine: one-card, multi-card, small-machine, quantized, attention-freeze; may repeat",
    )
    add_data_arguments(parser, "texts to train on")
    parser.add_argument("--out", metavar="DIR", help=out)
    parser.add_argument("--deepspeed", metavar="FILE", help="DeepSpeed's own configuration (JSON), for several ranks")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="any field of the configuration, as in stages.align.tokens=600k; rwkvinside config fields lists all",
    )


def add_data_arguments(parser: ArgumentParser, text: str) -> None:
    """Add --data, whose help begins with a text, and --val."""
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="SOURCE",
        help=f"{text}: file, directory, hub:NAME[:CONFIG] or a name that rwkvinside data presets lists; may repeat "
        "(default: fineweb-edu, where the teacher is from the hub)",
    )
    parser.add_argument(
        "--val",
        action="append",
        default=[],
        metavar="SOURCE",
        help="the same, to validate on (default: one in a hundred documents of --data)",
    )


def config_from(args: argparse.Namespace, stage: str | None = None, base: Sequence[Mapping] = ()) -> Config:
    """Return the checked configuration that parsed arguments ask for.

    Args:
        args: of a parser with `add_config_arguments`.
        stage: see `load_config`.
        base: settings below those of the arguments.

    Raises:
        UserError: lists all problems.
    """
    from ..config.load import load_config

    settings: dict[str, Any] = {
        name: getattr(args, name)
        for name in ("teacher", "recipe", "variant", "data", "val", "out", "deepspeed", "overrides")
    }
    return load_config([*base, *args.config], stage=stage, **settings)
