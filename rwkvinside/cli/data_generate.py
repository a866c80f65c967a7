"""`rwkvinside data generate`: text by the teacher itself, where there is no other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .arguments import ArgumentParser, add_device_argument, add_drawing_arguments, at_least, count


def main(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Write texts or conversations to a .jsonl file.

    Raises:
        UserError: an input that cannot be used, an output that cannot be written; `Interrupted` by ctrl-C.
    """
    parser.add_argument("--teacher", required=True, metavar="NAME", help="who writes: preset, hub id or directory")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="file to write")
    parser.add_argument(
        "--tokens", type=count, default=1_000_000, metavar="N", help="to write in all, such as 600k (default: 1M)"
    )
    parser.add_argument("--plain", action="store_true", help="texts, even if the teacher has a chat template")
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="begin with these, one a line: beginnings of texts, or a user's turns",
    )
    parser.add_argument(
        "--max-tokens", type=count, default=512, metavar="N", help="of one text or answer (default: 512)"
    )
    parser.add_argument("--rows", type=at_least(1), default=16, metavar="N", help="texts at a time (default: 16)")
    add_drawing_arguments(parser, temperature=1.0, top_p=1.0)
    add_device_argument(parser, "where the teacher runs")
    args = parser.parse(argv)
    from ..conversion.generate import generate_text
    from ..teacher.sampling import Sampling

    sampling = Sampling(args.temperature, args.top_p, args.max_tokens, args.rows, args.seed)
    generate_text(
        args.teacher,
        args.out,
        args.tokens,
        sampling,
        plain=args.plain,
        prompts=args.prompts,
        device=args.device,
    )
    return 0
