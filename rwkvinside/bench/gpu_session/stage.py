"""The process of one stage: `python -m rwkvinside.bench.gpu_session.stage NAME --out DIR --seconds S [--dry]`."""

from __future__ import annotations

import time

STARTED = time.monotonic()  # before anything heavy is imported

import argparse  # noqa: E402
import gc  # noqa: E402
import sys  # noqa: E402
import traceback  # noqa: E402
from collections.abc import Callable, Mapping  # noqa: E402
from importlib import import_module  # noqa: E402
from pathlib import Path  # noqa: E402

from .results import append  # noqa: E402
from .session import BEGUN, BROKEN  # noqa: E402


class Stage:
    """What a stage's `run(stage)` gets.

    Args:
        name: of the stage.
        directory: of the results.
        seconds: that it has, from the start of the process.
        dry: on the CPU, with tiny shapes.
        skip: number of attempts that an earlier process has made.

    Attributes:
        dry: see above.
        device: "cuda", or "cpu" when dry.
        directory: see above, for files other than the results.
    """

    def __init__(self, name: str, directory: Path, seconds: float, dry: bool, skip: int = 0):
        self.name, self.directory, self.dry = name, directory, dry
        self.device = "cpu" if dry else "cuda"
        self._seconds, self._skip, self._attempts = seconds, skip, 0

    def left(self) -> float:
        """Return the seconds that are left."""
        return self._seconds - (time.monotonic() - STARTED)

    def record(self, what: str, **numbers: object) -> None:
        """Append a measurement to the results, at once."""
        seconds = round(time.monotonic() - STARTED, 2)
        append(self.directory, {"stage": self.name, "seconds": seconds, "what": what, **numbers})

    def attempt(self, what: str, function: Callable[[], Mapping], needs: float = 2.0) -> bool:
        """Run a measurement and record its result, or its error, and go on.

        Args:
            what: it measures.
            function: returns the numbers by name.
            needs: seconds that must be left for it.

        Returns:
            Whether it was measured now.

        Raises:
            SystemExit: the CUDA context no longer works; another process goes on with the next attempt.
        """
        number, self._attempts = self._attempts, self._attempts + 1
        if number < self._skip:
            return False
        if self.left() < needs:
            self.record(what, attempt=number, skipped=f"{self.left():.0f} s left, it needs {needs:g}")
            return False
        _free()
        print(f"{BEGUN}{what}", flush=True)
        began = time.monotonic()
        try:
            numbers = dict(function())
        except Exception as error:  # whatever it is, it is the result
            traceback.print_exc()
            numbers = {"error": f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"[:300]}
        self.record(what, **numbers, attempt=number, took=round(time.monotonic() - began, 2))
        _free()
        return "error" not in numbers


def _free() -> None:
    """Give memory back, after an error also that of the frames it went through."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:  # an illegal access, say: every later call would fail with the same words
        traceback.print_exc()
        raise SystemExit(BROKEN) from None


def main() -> None:
    """Run a stage."""
    parser = argparse.ArgumentParser(prog="stage", description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--module", help="the stage's module; default: the one of its name in this package")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--seconds", type=float, required=True, metavar="S")
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="leave out the first N attempts")
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    stage = Stage(args.name, Path(args.out).resolve(), args.seconds, args.dry, args.skip)
    import_module(args.module or f"{__package__}.{args.name}").run(stage)


if __name__ == "__main__":
    main()
