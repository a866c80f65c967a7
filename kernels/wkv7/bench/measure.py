"""Time and memory of calls, side by side: how `bench` measures, not what. Needs only torch."""

from __future__ import annotations

import math
import multiprocessing
import multiprocessing.connection
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rwkvinside.kernels.bench.candidates import CANDIDATES, Candidate, Op
from rwkvinside.kernels.bench.problem import (
    PASSES,
    Shape,
    ideal_bytes,
    make_inputs,
    make_pass,
    make_state,
    relative_errors,
)
from rwkvinside.support.process_memory import forget_peak, peak_bytes

TURN = {"cpu": 5e-3, "cuda": 20e-3}  # least seconds of a turn, so that clock and launch do not matter

try:
    from triton import TritonError
except ImportError:  # no Triton for this platform

    class TritonError(Exception):
        """Never raised."""


# How an op says that it cannot run here: missing packages and devices, no memory (torch's error is a RuntimeError),
# kernels that do not compile, shapes or dtypes that it does not take.
FAILURES = (ImportError, RuntimeError, ValueError, TypeError, AssertionError, TritonError)


def reason(error: BaseException) -> str:
    """Return the first line of an error, for a table."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


@dataclass(frozen=True)
class Bench:
    """Measurement of candidates on one problem after another.

    Attributes:
        device: "cpu" or "cuda".
        repeats: turns of each candidate, per problem and pass.
        seconds: how long these turns may take together.
        bandwidth: bytes per second of a copy on this device.
        deadline: time.monotonic() after which nothing starts.
    """

    device: str
    repeats: int
    seconds: float
    bandwidth: float
    deadline: float

    def problem(self, candidates: Sequence[Candidate], shape: Shape, dtype: torch.dtype) -> dict:
        """Measure all candidates on one problem.

        Returns:
            {"B", "T", "H", "N", "results": one per candidate}. A result is {"candidate", "not_run": reason} or
            {"candidate", "forward", "forward_backward" (not when T = 1), "error"}: passes as `_pass` makes them, errors
            as `relative_errors`; each of them may be {"not_run": reason} as well.
        """
        results = {candidate: {"candidate": candidate.name} for candidate in candidates}
        ops: dict[Candidate, dict[str, Op]] = {}
        for candidate in candidates:
            try:
                ops[candidate] = candidate.ops(self.device, shape.T)
            except RuntimeError as error:
                results[candidate]["not_run"] = reason(error)
        for which in PASSES[:1] if shape.T == 1 else PASSES:
            for candidate, result in self._pass(ops, shape, dtype, which).items():
                results[candidate][which] = result
        for candidate, by_setting in ops.items():
            result = results[candidate]
            chosen = result.get(PASSES[1], result[PASSES[0]]).get("setting")
            if "not_run" in result[PASSES[0]]:
                results[candidate] = {"candidate": candidate.name, **result[PASSES[0]]}
            elif candidate.is_wkv7 and chosen is not None:
                try:
                    result["error"] = relative_errors(candidate, by_setting[chosen], shape, dtype, self.device)
                except FAILURES as error:
                    result["error"] = {"not_run": reason(error)}
        return shape._asdict() | {"results": list(results.values())}

    def _pass(
        self, ops: dict[Candidate, dict[str, Op]], shape: Shape, dtype: torch.dtype, which: str
    ) -> dict[Candidate, dict]:
        """Time all settings of all candidates; return the best of each candidate.

        Returns:
            {"ms": median, "fastest_ms", "repeats": turns taken (0: only the warm-up), "asked": turns
            requested, "setting", "of_bound": time that the ideal bytes take at the speed of a copy, as a share of the
            median (None for what is no WKV-7), "extra_bytes": peak memory (None if unknown)} or {"not_run": reason} by
            candidate.
        """
        inputs = make_inputs(shape, dtype, self.device)
        state = make_state(shape, self.device) if shape.T == 1 else None
        runners = {
            (candidate, setting): make_pass(op, which, inputs, state)
            for candidate, by_setting in ops.items()
            for setting, op in by_setting.items()
        }
        timings = race(runners, self.device, self.repeats, self.seconds, self.deadline)
        results = {}
        for candidate, by_setting in ops.items():
            ran = [setting for setting in by_setting if timings[candidate, setting].failure is None]
            if not ran:
                results[candidate] = {"not_run": timings[candidate, next(iter(by_setting))].failure}
                continue
            best = min(ran, key=lambda setting: timings[candidate, setting].median)
            timing, run = timings[candidate, best], runners[candidate, best]
            if self.device == "cuda":
                extra = extra_memory_cuda(run)
            elif timing.median <= self.seconds:
                extra = extra_memory_cpu(candidate.name, best, shape, dtype, which)
            else:
                extra = None
            bound = ideal_bytes(shape, dtype, which) / self.bandwidth
            results[candidate] = {
                "ms": 1e3 * timing.median,
                "fastest_ms": 1e3 * min(timing.seconds),
                "repeats": timing.repeats,
                "asked": self.repeats,
                "setting": best,
                "of_bound": bound / timing.median if candidate.is_wkv7 else None,
                "extra_bytes": extra,
            }
        return results


@dataclass
class Timing:
    """Result of a race for one runner.

    Attributes:
        seconds: of one call, by repeat; of the warm-up if no repeat fitted.
        repeats: turns that were taken.
        failure: why it did not run, else None.
    """

    seconds: list[float]
    repeats: int = 0
    failure: str | None = None

    @property
    def median(self) -> float:
        """Median seconds of one call."""
        return statistics.median(self.seconds)


def race(
    runners: dict[object, Callable[[], object]], device: str, repeats: int, budget: float, deadline: float
) -> dict[object, Timing]:
    """Time calls in turns, so that other load on the machine affects all alike.

    Args:
        runners: calls without arguments by key.
        device: "cpu" or "cuda".
        repeats: turns of each; a turn is as many calls as take `TURN` seconds.
        budget: seconds of turns for each runner; turns that do not fit are left out.
        deadline: time.monotonic() after which nothing starts.
    """

    def turn(run: Callable[[], object], count: int) -> float:
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            run()
        _synchronize(device)
        return (time.perf_counter() - start) / count

    timings: dict[object, Timing] = {}
    for key, run in runners.items():
        timings[key] = timing = Timing([])
        if time.monotonic() > deadline:
            timing.failure = "no time left"
            continue
        try:
            once = turn(run, 1)  # compiles, loads libraries, fills the allocator's cache
            if device == "cuda" or once < budget / 4:
                once = turn(run, 1)
            timing.seconds = [once]
        except FAILURES as error:
            timing.failure = reason(error)
    counts = {k: max(1, math.ceil(TURN[device] / max(t.seconds[0], 1e-7))) for k, t in timings.items() if not t.failure}
    for repeat in range(repeats):
        for key, count in counts.items():
            timing = timings[key]
            spent = count * sum(timing.seconds[: timing.repeats])
            fits = spent + count * timing.seconds[-1] <= budget and time.monotonic() < deadline
            if timing.failure or timing.repeats < repeat or not fits:
                continue
            try:
                seconds = turn(runners[key], count)
            except FAILURES as error:  # memory that others hold by now
                timing.failure = reason(error)
                continue
            timing.seconds = [*timing.seconds[: timing.repeats], seconds]
            timing.repeats += 1
    return timings


def copy_bandwidth(device: str) -> float:
    """Measure bytes per second, read and written, of a copy far larger than any cache.

    This is what "of bound" refers to.
    """
    size = (1 << 30) if device == "cuda" else (1 << 28)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(8):
        _synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size / statistics.median(seconds[1:])


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def extra_memory_cuda(run: Callable[[], object]) -> int:
    """Return the peak bytes that a call allocates, its results included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def extra_memory_cpu(name: str, setting: str, shape: Shape, dtype: torch.dtype, which: str) -> int | None:
    """Measure how much one call raises the peak resident memory of a fresh process.

    Args:
        name, setting: of the candidate; an op cannot be sent to another process.
        shape, dtype: of the problem.
        which: one of `PASSES`.

    Returns:
        Bytes, the results included; None if the system does not say (Linux does, in /proc) or the process was killed.
    """
    context = multiprocessing.get_context("forkserver")  # imports torch once, and has not computed anything yet
    context.set_forkserver_preload([__name__])
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, name, setting, shape, dtype, which, torch.get_num_threads())
    child = context.Process(target=_measure_growth, args=arguments)
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:  # it ended without an answer
        return None
    finally:
        child.join()


def _measure_growth(
    sender: multiprocessing.connection.Connection,
    name: str,
    setting: str,
    shape: Shape,
    dtype: torch.dtype,
    which: str,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    op = next(c for c in CANDIDATES if c.name == name).ops("cpu", shape.T)[setting]
    tiny = shape._replace(B=1, T=min(shape.T, 16))
    make_pass(op, which, make_inputs(tiny, dtype, "cpu"), None)()  # loads libraries, starts threads
    run = make_pass(op, which, make_inputs(shape, dtype, "cpu"), make_state(shape, "cpu") if shape.T == 1 else None)
    if not forget_peak():  # making the inputs has pushed it up
        sender.send(None)
        return
    before = peak_bytes()
    results = run()
    sender.send(peak_bytes() - before)
    del results
