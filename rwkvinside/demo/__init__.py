"""The whole path on one small machine, from text to a hybrid that generates; see `command.py`."""

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """`rwkvinside demo`: parse the arguments, then import what the demo needs and run it."""
    import argparse

    from . import command

    description = "The whole path on this machine: from a tiny teacher to a hybrid that generates."
    parser = argparse.ArgumentParser(prog="rwkvinside demo", description=description)
    command.add_demo_arguments(parser)
    return command.main(parser.parse_args(argv))
