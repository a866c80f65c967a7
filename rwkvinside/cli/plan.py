"""`rwkvinside plan`: whether a run fits, how long it takes, and what it would do."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UserError
from .arguments import (
    ArgumentParser,
    add_config_arguments,
    add_output_arguments,
    add_plan_arguments,
    config_from,
    number,
)


def main(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Print the plan of a configuration."""
    add_config_arguments(parser)
    add_plan_arguments(parser)
    parser.add_argument("-v", "--verbose", action="store_true", help="all details of every stage")
    parser.add_argument(
        "--mfu",
        type=number,
        metavar="X",
        help="share of the peak speed to expect (default: 0.2 on a CPU, 0.15 on a GPU)",
    )
    parser.add_argument("--price", type=number, metavar="P", help="of a GPU for an hour: say what the run costs")
    add_output_arguments(parser)
    args = parser.parse(argv)
    if args.mfu is not None and not 0 < args.mfu <= 1:
        raise UserError(f"--mfu {args.mfu:g}", "allowed: above 0, up to 1")
    config = config_from(args)
    from ..planning.fitting import resolve_fitted
    from ..planning.forecast import expected_rate, forecast, forecast_text
    from ..planning.plan import plan_text
    from ..support.files import write_json

    plan = resolve_fitted(config, ranks=args.ranks or 1, gpu=args.gpu)
    found = forecast(plan, config, args.gpu)
    rate = expected_rate(found, args.mfu)
    print(forecast_text(found, rate, args.price), end="")
    if args.verbose:
        print(f"\n{plan_text(plan, config, args.gpu)}", end="")
    if args.json is not None:
        speed = None if rate is None else {"flops": rate.flops, "origin": rate.origin}
        hours = None if rate is None else found.seconds(rate) / 3600
        write_json(args.json, found.to_dict() | {"rate": speed, "hours": hours})
    return 0
