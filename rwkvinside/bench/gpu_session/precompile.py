"""Compile, with all processors, what the stages `correct` and `kernels` will launch, into Triton's cache."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace

import torch

from ...kernels.gpu.launch import Launch
from .correct import cotangents
from .wkv_cases import PARTS, Case, Plan, correctness_cases, large_cases, timed_cases, variants, varied_cases

ABSENT = (9, 0)  # what a dry run compiles for
LENGTH = 256  # tokens, enough for every number of segments


def run(stage) -> None:
    """Compile every launch; one line says how many and how long."""
    capability = torch.cuda.get_device_capability() if stage.device == "cuda" else ABSENT
    count = len(_launches(stage.dry, capability))
    workers = max(1, min(count, (os.cpu_count() or 2) - 2, 14))
    start = time.monotonic()
    os.environ.pop("TRITON_INTERPRET", None)  # of a dry run: what is started from here on compiles
    context = multiprocessing.get_context("spawn")
    prepare = dict(initializer=_absent, initargs=(capability,)) if stage.dry else {}
    with ProcessPoolExecutor(workers, context, **prepare) as pool:
        jobs = [pool.submit(_compile, stage.dry, capability, index) for index in range(count)]
        errors = [error for job in as_completed(jobs) if (error := job.exception())]
    failures = [f"{type(error).__name__}: {str(error).splitlines()[0][:200]}" for error in errors]
    stage.record("compiled", launches=count, seconds=time.monotonic() - start, workers=workers, failures=failures[:5])


def _absent(capability: tuple[int, int]) -> None:
    """Make Triton compile for a GPU that is not there."""
    import triton

    from ...kernels.gpu.compile import _AbsentGPU

    triton.runtime.driver.set_active(_AbsentGPU(10 * capability[0] + capability[1]))


@functools.cache
def _launches(dry: bool, capability: tuple[int, int]) -> list[Launch]:
    """Return the launches in the same order in every process, each kernel with its constants once.

    On a GPU they are of short sequences, and real: what Triton has compiled for tensors without memory there, it does
    not find again for others.
    """
    found: dict = {}
    for plan, wanted in itertools.islice(_plans(dry, capability), 1 if dry else None):
        for launch in itertools.chain(plan.forward, plan.backward):
            name = launch.kernel.__name__
            if wanted is None or name in wanted:
                key = (name, *launch.constants.items(), launch.tuning, _specialized(launch.args))
                found.setdefault(key, launch)
    slow = {"gradient": 0, "prepare": 1}  # first, so that none is left alone at the end
    return sorted(found.values(), key=lambda launch: slow.get(launch.kernel.__name__, 2))


def _plans(dry: bool, capability: tuple[int, int]) -> Iterator[tuple[Plan, set[str] | None]]:
    """Yield what the stages launch, and which of its kernels they launch (None: all)."""

    def plan(case: Case, ends: bool) -> Plan:
        if dry:
            return case.plan(case.placeholders(), capability, **(case.ends() if ends else {}))
        short = replace(case, batch=1, time=LENGTH)
        return short.plan(short.inputs("cuda"), capability, *(cotangents(short, "cuda") if ends else ()))

    checked = [*correctness_cases(dry), *([] if dry else large_cases())]
    for case in checked + [replace(case, block_v=16, segments=1) for case in large_cases() if not dry]:
        yield plan(case, True), None
    for case in timed_cases(dry):
        yield plan(case, False), None
    for case, part in varied_cases(dry):
        for each in variants(case, part, capability):
            yield plan(each, False), PARTS[part]


def _specialized(args: dict) -> tuple:
    """Return what Triton makes other code for: types, numbers that are 1 or multiples of 16."""
    return tuple(
        (name, str(x.dtype) if isinstance(x, torch.Tensor) else None if x is None else (x == 1, x % 16 == 0))
        for name, x in args.items()
    )


def _compile(dry: bool, capability: tuple[int, int], index: int) -> None:
    launch = _launches(dry, capability)[index]
    launch.compile() if dry else launch.run()
