"""`rwkvinside generate DIR`: what a model writes after prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..support.files import write_json
from .arguments import ArgumentParser, add_output_arguments, add_sampling_arguments, at_least, sampling_of


def main(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Generate after each prompt and print it.

    Raises:
        UserError: a model that cannot be loaded, prompts that cannot be read.
    """
    parser.add_argument("model", metavar="DIR_OR_RUN", help="exported model or run directory")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may repeat")
    given.add_argument("--prompts", type=Path, metavar="FILE", help="prompts, one a line")
    parser.add_argument("--system", default="", metavar="TEXT", help="system prompt (default: none)")
    add_sampling_arguments(parser)
    parser.add_argument("--rows", type=at_least(1), default=8, metavar="N", help="prompts at a time (default: 8)")
    add_output_arguments(parser, json="the texts")
    args = parser.parse(argv)
    from ..lm.load import load_model
    from ..support.files import read_lines
    from ..talk.prompts import generate

    prompts = args.prompt or read_lines(args.prompts, "prompts")
    notes, out = Console(stderr=True, highlight=False), Console(highlight=False, soft_wrap=True)
    model, tokenizer = load_model(args.model, args.device, notes)
    result = generate(
        model,
        tokenizer,
        prompts,
        sampling_of(args, args.rows),
        plain=args.plain,
        system=args.system,
        notes=notes,
    )
    for number, each in enumerate(result.texts):
        if number:
            out.print()
        out.print(each.prompt, style="bold", markup=False, end="" if result.plain else "\n")
        out.print(each.text, markup=False)
    notes.print(f"{result.tokens:,} tokens in {result.seconds:.1f} s, {result.tokens_per_second:.0f} a second")
    if args.json is not None:
        write_json(args.json, {"model": args.model} | result.to_dict())
    return 0
