"""`python -m rwkvinside.bench.gpu_session`, the same as `rwkvinside bench gpu`; runs from a working tree, too."""

import argparse
import sys

from ...errors import report_errors
from . import __doc__ as description
from .session import add_arguments, main


@report_errors
def _command(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rwkvinside.bench.gpu_session", description=description)
    add_arguments(parser)
    return main(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(_command())
