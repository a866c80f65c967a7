"""`rwkvinside chat DIR`: talk to a model, or to a student and its teacher side by side."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from .arguments import ArgumentParser, add_sampling_arguments, model_name, sampling_of


def main(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Talk until Ctrl-D, /quit or the end of the input.

    Raises:
        UserError: a model that cannot be loaded, a state that is not one of it.
    """
    parser.add_argument("model", metavar="DIR_OR_RUN", help="exported model or run directory")
    parser.add_argument(
        "--teacher", type=model_name, metavar="NAME", help="show its replies beside: preset, hub id or directory"
    )
    parser.add_argument("--system", default="", metavar="TEXT", help="system prompt, read once (default: none)")
    parser.add_argument("--load", type=Path, metavar="FILE", help="go on from a state that /save has written")
    add_sampling_arguments(parser)
    args = parser.parse(argv)
    from ..talk.screen import Screen
    from ..talk.voices import voices_of

    terminal, notes = Console(highlight=False), Console(stderr=True, highlight=False)
    how = dict(system=args.system, plain=args.plain, device=args.device, notes=notes)
    voices = voices_of(args.model, args.teacher, sampling_of(args), **how)
    if voices["student"].plain and not args.plain:
        notes.print("no chat template: the model continues what you write (as with --plain)", style="dim")
    screen = Screen(voices, terminal, terminal if terminal.is_terminal else notes)
    if args.load is not None:
        screen.load(args.load)
    if terminal.is_terminal and sys.stdin.isatty():
        screen.greet()
        screen.talk(_typed(terminal))
    else:
        screen.talk(line.rstrip("\n") for line in sys.stdin)
    return 0


def _typed(console: Console) -> Iterator[str]:
    """Yield the lines that a user types, until Ctrl-D."""
    import readline  # noqa: F401  # gives `input` history and editing

    while True:
        try:
            yield input("\n\001\033[1m\002> \001\033[0m\002")
        except KeyboardInterrupt:
            console.print("\nCtrl-D ends the talk", style="dim")
        except EOFError:
            console.print()
            return
