"""Compile what a stage will launch before it launches it, in threads of its own process.

Triton would compile each kernel when it is first launched, one after another, with one processor of many: a minute of a
session, or several. Its passes and ptxas run without Python's lock, and what was compiled in threads is the same code
bit for bit (30 kernels, 1, 2 and 8 threads, Triton 3.6.0 and 3.7.1).

In processes it does not work: what fourteen of them had compiled into Triton's cache on a GPU machine was compiled
again by the stages. Why is not known.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
import triton

from ...kernels.gpu.kernels import RUNTIME
from ...kernels.gpu.launch import Launch

if TYPE_CHECKING:
    from .stage import Stage

SECONDS = {"gradient": 12.0, "prepare": 3.0}  # to compile a kernel, as measured beside an H200; the others:
OTHERS = 0.6
SECONDS |= {"inputs_backward": 3.0, "inputs_forward": 1.5}  # not measured there: a guess by what they take elsewhere
MOST_THREADS = 16
GAIN = 0.5  # of a thread beside others: of eight, 5.6 were runnable on average, imports and the last kernel included


class Compiler:
    """Compiles the launches of a stage, and knows what it has compiled.

    Args:
        stage: whose time is used, and whose results say what was compiled.
    """

    def __init__(self, stage: Stage):
        self._stage = stage
        self._known: set[tuple] = set()
        self._threads = min(MOST_THREADS, len(os.sched_getaffinity(0)))

    def seconds(self, launches: Iterable[Launch]) -> float:
        """Return the seconds that launching them would take because they are not compiled yet, as estimated."""
        return sum(_seconds(launch) for launch in self._unknown(launches).values())

    def ahead(self, what: str, launches: Iterable[Launch], spare: float = 5.0) -> None:
        """Compile launches, the first ones if there is no time for all; one line says how many and how long.

        What does not compile is not an error here: launching it says why.

        Args:
            what: they are for.
            launches: in the order of their value; tensors may be on the meta device.
            spare: seconds to leave for what is measured with them.
        """
        unknown = self._unknown(launches)
        chosen: dict[tuple, Launch] = {}
        longest = total = 0.0
        for key, launch in unknown.items():
            longest, total = max(longest, _seconds(launch)), total + _seconds(launch)
            if max(longest, total / max(1.0, GAIN * self._threads)) > self._stage.left() - spare:
                break
            chosen[key] = launch
        if not unknown:
            return
        slowest_first = sorted(chosen.values(), key=_seconds, reverse=True)  # so that none is left alone at the end
        began = time.monotonic()
        with ThreadPoolExecutor(self._threads) as pool, triton.AsyncCompileMode(pool, ignore_errors=True) as mode:
            for launch in slowest_first:
                launch.compile()
        took = round(time.monotonic() - began, 2)
        self._known |= chosen.keys()
        errors = [f"{type(error).__name__}: {error}"[:200] for job in mode.raw_futures if (error := job.exception())]
        done = {"kernels": len(mode.raw_futures), "took": took, "threads": self._threads, "errors": errors}
        self._stage.record(f"compiled: {what}", **done, left_out=len(unknown) - len(chosen))

    def _unknown(self, launches: Iterable[Launch]) -> dict[tuple, Launch]:
        keyed = {} if triton.knobs.runtime.interpret else {_key(launch): launch for launch in launches}
        return {key: launch for key, launch in keyed.items() if key not in self._known}


def _key(launch: Launch) -> tuple:
    """Return what Triton makes other code for: constants, settings, types, numbers that are 1 or multiples of 16."""

    def kind(name: str, x: object) -> object:
        if isinstance(x, torch.Tensor):
            return str(x.dtype)
        return (x == 1, x % 16 == 0) if isinstance(x, int) and name not in RUNTIME else type(x)

    kinds = tuple((name, kind(name, x)) for name, x in launch.args.items())
    return (launch.kernel.__name__, *launch.constants.items(), launch.tuning, kinds)


def _seconds(launch: Launch) -> float:
    return SECONDS.get(launch.kernel.__name__, OTHERS)
