"""The flags of the benchmark. Imports neither torch nor the kernels, so that help appears at once."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `rwkvinside bench wkv7`."""
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where (default: cuda if there is one)")
    parser.add_argument(
        "--shapes",
        metavar="B,T,H,N;...",
        help="problems: batch, tokens, heads, head size (default: some for the device)",
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), help="of the inputs (default: fp32 on a CPU, bf16 on a GPU)"
    )
    parser.add_argument(
        "--candidates",
        metavar="NAME,...",
        help="such as native,chunked, or one member as in triton:fast (default: all)",
    )
    parser.add_argument("--decode", action="store_true", help="one token with a state instead of sequences")
    parser.add_argument("--suite", choices=("gpu",), help="what to measure on a new GPU, in under eight minutes")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: as torch chooses)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="turns of each candidate (default: 5)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=10,
        metavar="S",
        help="of a candidate's turns in a pass; turns that do not fit are left out (default: 10)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here, after each shape")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the times here (needs matplotlib)")
