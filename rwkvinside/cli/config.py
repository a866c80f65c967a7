"""`rwkvinside config`: the configuration that results from files, flags and `key=value`, and what its fields mean."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ..errors import UserError
from ..support.files import write_json
from .arguments import ArgumentParser, add_config_arguments, config_from, output_file, run_command

COMMANDS = {
    "show": ("config:show", "print the configuration with all defaults filled in, as YAML"),
    "schema": ("config:schema", "write the JSON schema of configuration files, for editors"),
    "fields": ("config:fields", "list every field with its default and meaning"),
}


def main(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Run one of the commands."""
    return run_command(parser, argv, COMMANDS)


def show(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Print a configuration as YAML."""
    add_config_arguments(parser)
    config = config_from(parser.parse(argv))
    from ..config.show import to_yaml

    print(to_yaml(config), end="")
    return 0


def schema(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Print or write the JSON schema."""
    parser.add_argument("--out", type=output_file, metavar="FILE", help="write it here (default: print it)")
    args = parser.parse(argv)
    from ..config.show import json_schema

    if args.out is None:
        print(json.dumps(json_schema(), indent=2))
    else:
        write_json(args.out, json_schema())
    return 0


def fields(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Print one line for each field.

    Raises:
        UserError: no field begins so.
    """
    parser.add_argument(
        "prefix",
        nargs="?",
        default="",
        metavar="PREFIX",
        help="only fields that begin so, such as student. (default: all)",
    )
    prefix = parser.parse(argv).prefix
    from ..config.show import describe

    found = [row for row in describe() if row[0].startswith(prefix)]
    if not found:
        raise UserError(f"no field begins with {prefix}", "rwkvinside config fields lists all; * is a default")
    for path, default, description in found:
        print(f"{path} [{default}]: {description}" if default else f"{path}: {description}")
    return 0
