"""`python -m rwkvinside.kernels.bench`, the same command as `rwkvinside bench wkv7`; needs torch alone."""

import argparse
import sys

from rwkvinside.errors import report_errors
from rwkvinside.kernels import bench
from rwkvinside.kernels.bench.arguments import add_arguments
from rwkvinside.kernels.bench.command import main


@report_errors
def _command(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rwkvinside.kernels.bench", description=bench.__doc__)
    add_arguments(parser)
    return main(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(_command())
