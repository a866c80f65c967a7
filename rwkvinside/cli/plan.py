"""`rwkvinside plan`: whether a run fits, how long it takes, and what it would do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import UserError
from .arguments import ArgumentParser, add_config_arguments, add_output_arguments, at_least, config_from, number

if TYPE_CHECKING:
    from ..planning.forecast import Rate

MFU = {"cpu": 0.2, "cuda": 0.15}  # share of the peak that is assumed: docs/benchmarks.md has measured ones


def main(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Print the plan of a configuration."""
    add_config_arguments(parser)
    parser.add_argument(
        "--ranks", type=at_least(1), default=1, metavar="N", help="processes that share the work (default: 1)"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="all details of every stage")
    assumed = f"{MFU['cpu']} on a CPU, {MFU['cuda']} on a GPU"
    parser.add_argument("--mfu", type=number, metavar="X", help=f"share of the peak to expect (default: {assumed})")
    parser.add_argument("--gpu", metavar="NAME", help="a device that is not here, such as H100, for the time")
    parser.add_argument("--price", type=number, metavar="P", help="of a GPU for an hour, for the cost")
    add_output_arguments(parser)
    args = parser.parse(argv)
    if args.mfu is not None and not 0 < args.mfu <= 1:
        raise UserError(f"--mfu {args.mfu:g}", "allowed: above 0, up to 1")
    config = config_from(args)
    from ..planning.fitting import resolve_fitted
    from ..planning.forecast import forecast, forecast_text
    from ..planning.plan import plan_text
    from ..support.files import write_json

    plan = resolve_fitted(config, ranks=args.ranks)
    details = plan_text(plan, config)
    found = forecast(plan, config)
    rate = _rate(found.device, found.precision, found.ranks, args.gpu, args.mfu or MFU[found.device])
    print(forecast_text(found, rate, args.price), end="")
    if args.verbose:
        print(f"\n{details}", end="")
    if args.json is not None:
        speed = None if rate is None else {"flops": rate.flops, "origin": rate.origin}
        hours = None if rate is None else found.flops / rate.flops / 3600
        write_json(args.json, found.to_dict() | {"rate": speed, "hours": hours})
    return 0


def _rate(device: str, precision: str, ranks: int, gpu: str | None, mfu: float) -> Rate | None:
    """Return the speed to expect; None: the device is not here and not named."""
    import torch

    from ..planning.devices import PEAKS, named_peak, peak_flops
    from ..planning.forecast import Rate

    if gpu is not None:
        peak, origin = named_peak(gpu, precision), f"data sheet of {gpu}"
        if peak is None:
            known = ", ".join(words for words, *_ in PEAKS)
            raise UserError(f"--gpu {gpu} is not known", f"known: {known}")
    elif device == "cuda" and not torch.cuda.is_available():
        return None
    else:
        peak, origin = peak_flops(torch.device(device), precision)
        origin = "the peak of this machine" + (" as measured now" if origin == "measured" else " by its data sheet")
    return Rate(peak * ranks * mfu, f"{100 * mfu:g} % of {origin}" + (f", {ranks} ranks" if ranks > 1 else ""))
