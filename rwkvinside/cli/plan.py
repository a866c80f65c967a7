"""`rwkvinside plan`: what a run would do."""

from __future__ import annotations

from collections.abc import Sequence

from .arguments import ArgumentParser, add_config_arguments, at_least, config_from


def main(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Print the plan of a configuration."""
    add_config_arguments(parser)
    parser.add_argument(
        "--ranks", type=at_least(1), default=1, metavar="N", help="processes that share the work (default: 1)"
    )
    args = parser.parse(argv)
    config = config_from(args)
    from ..planning.fitting import resolve_fitted
    from ..planning.plan import plan_text

    print(plan_text(resolve_fitted(config, ranks=args.ranks), config), end="")
    return 0
