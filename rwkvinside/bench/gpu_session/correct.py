"""Are the kernels right on this GPU? Everything against the recurrence in float64, on the GPU, outputs poisoned first.

The measure is the relative L2 distance. `LIMITS` holds what the interpreter's tests allow; a GPU's exp2 and order of
summation cost fp32 a little.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...kernels.gpu.decode import plan_step
from ...kernels.gpu.launch import Launch, capability
from ...modeling.wkv7 import wkv7, wkv7_reference
from .compiling import Compiler
from .mixer_steps import PRESETS, mixer_steps
from .timing import captured, synchronize
from .wkv_cases import Capability, Case

if TYPE_CHECKING:
    from .stage import Stage

NAMES = ("y", "final", "dr", "dw", "dk", "dv", "da", "db", "dstate")
# buffers between launches, which some launch must fill before another reads them
BETWEEN = {
    f"{name}_"
    for name in ("Q", "W", "Kp", "Bg", "Z", "C", "T", "X", "RX", "starts", "U", "ends", "P", "affine", "grads")
}
LIMITS = {"fp32": 5e-6, "high": 6e-3, "balanced": 7e-3, "fast": 1e-2}
BLOCKS = (16, 32, 64)


def run(stage: Stage) -> None:
    """Check all cases, the most important first; a line each, with every distance and whether it is in the limit."""
    device = stage.device
    found = capability(torch.device(device))
    compiler = Compiler(stage)
    first, *others = groups(stage.dry)
    special = Case(1, 40, 2, 16, "fp32") if stage.dry else Case(1, 256, 3, 64, "balanced")
    precise = replace(special, precision="fp32")
    large = [] if stage.dry else large_cases()

    def ahead(what: str, cases: list[Case], more: Sequence[Launch] = ()) -> None:
        compiler.ahead(what, [*(launch for case in cases for launch in launches(case, found)), *more])

    def compare(cases: list[Case]) -> None:
        for case in cases:
            needs = 2 + compiler.seconds(launches(case, found))
            stage.attempt(f"float64 {case.name}", partial(against_float64, case, device), needs)

    few = narrow(special)  # as `wkv7` computes few heads
    odd = [*few.inference(found, masked=True), *few.inference(found, sequences=len(bounds(special)) - 1)]
    ahead("the mode that trains", [*first, special, precise], odd)
    compare(first)
    stage.attempt("one key", partial(against_float64, special, device, 4e-2, decay=-1e-4, one_key=True))
    for decay in (-5.0, 0.0):
        stage.attempt(f"log decay {decay}", partial(against_float64, special, device, 1.5e-2, decay=decay))
        stage.attempt(f"log decay {decay}, fp32", partial(against_float64, precise, device, 2e-4, decay=decay))
    stage.attempt("packed", partial(packed, special, device))
    stage.attempt("masked, NaN behind the mask", partial(masked, special, device))
    stage.attempt("decoding, token by token", partial(decoding, special, device))
    for preset in PRESETS:
        mixing = partial(one_token_of_a_mixer, preset, device, special.size, 2 if stage.dry else 12)
        stage.attempt(f"one token of a mixer, {preset}", mixing)
    ahead("timed shapes", [part for case in large for part in (case, narrow(case))])
    for case in large:
        needs = 5 + compiler.seconds([*launches(case, found), *launches(narrow(case), found)])
        stage.attempt(f"timed shape {case.name}", partial(timed_shape, case, device), needs)
    for cases in others:
        ahead(", ".join(dict.fromkeys(f"N={case.size} {case.precision}" for case in cases)), cases)
        compare(cases)


def groups(dry: bool) -> list[list[Case]]:
    """Return the cases that are compared with float64, in groups that are compiled together."""
    if dry:
        return [
            [Case(1, 40, 2, 16, "balanced", block_v=16)],
            [Case(1, 40, 2, 16, "fp32", groups=1, block_v=16, segments=2)],
        ]
    return [
        [Case(1, 700, 3, size, block_v=rows) for size in (64, 128) for rows in BLOCKS],
        [Case(1, 700, 3, size, precision) for precision in ("fp32", "fast", "high") for size in (64, 128)],
        [
            *(Case(1, 700, 3, 64, "balanced", block_v=16, segments=segments) for segments in (2, 5)),
            *(Case(1, 700, 3, 64, "fp32", block_v=16, segments=segments) for segments in (2, 5)),
            *(Case(2, 700, 6, 64, "balanced", groups=2), Case(2, 700, 6, 128, "balanced", groups=3)),
        ],
        [Case(1, 700, 3, size, block_v=rows) for size in (40, 256) for rows in BLOCKS],
        [Case(1, 700, 3, size, precision) for precision in ("fp32", "fast", "high") for size in (40, 256)],
    ]


def large_cases() -> list[Case]:
    """Return the cases that are checked at their full size."""
    return [
        Case(8, 4096, 64, 64),
        Case(8, 4096, 32, 128),
        Case(4, 4096, 16, 128, groups=8),
        Case(1, 4096, 32, 64, block_v=16, segments=4),
    ]


def narrow(case: Case) -> Case:
    """Return the case with the fewest rows per program and one segment."""
    return replace(case, block_v=16, segments=1)


def launches(case: Case, found: Capability) -> list[Launch]:
    """Return what `launched` will launch, without memory."""
    return case.plan(case.placeholders(), found, **case.ends()).launches


def judged(distances: dict[str, float], limit: float) -> dict:
    """Return the distances with the limit and whether all keep it (what is no number keeps none)."""
    ok = all(x <= limit for x in distances.values())
    return {"distances": distances, "worst": max(distances.values()), "limit": limit, "ok": ok}


def distance(found: Tensor, wanted: Tensor) -> float:
    """Return the relative L2 distance."""
    return ((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


def launched(case: Case, inputs: list[Tensor], state: Tensor, dy: Tensor, dfinal: Tensor) -> list[Tensor]:
    """Return y, the final state and the seven gradients."""
    plan = case.plan(inputs, capability(inputs[0].device), state, dy, dfinal)
    for x in (plan.y, plan.final, *plan.grads):
        x.fill_(float("nan"))
    for launch in plan.launches:
        for name in BETWEEN & launch.args.keys():
            if launch.args[name] is not None:
                launch.args[name].fill_(float("nan"))
    for launch in plan.launches:
        launch.run()
    return [plan.y, plan.final, *plan.grads]


def reference(inputs: list[Tensor], state: Tensor, dy: Tensor, dfinal: Tensor) -> list[Tensor]:
    """Return the same in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (*inputs, state)]
    r, w, k, v, a, b, initial = leaves
    k, v, a, b = (x.repeat_interleave(r.shape[2] // x.shape[2], 2) for x in (k, v, a, b))
    y, final = wkv7_reference(r, w, k, v, a, b, initial)
    grads = torch.autograd.grad((y, final), leaves, (dy.to(y), dfinal.to(final)))
    return [y.detach(), final.detach(), *grads]


def cotangents(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return an initial state and gradients of y and of the final state."""
    random = torch.Generator(device).manual_seed(1)
    matrix = (case.batch, case.heads, case.size, case.size)
    state, dfinal = (torch.randn(matrix, generator=random, device=device) for _ in range(2))
    dy = torch.randn(case.batch, case.time, case.heads, case.size, generator=random, device=device)
    return state, dy.to(case.dtype), dfinal


def against_float64(
    case: Case, device: str, limit: float | None = None, decay: float | None = None, one_key: bool = False
) -> dict:
    """Compare forward and backward of a case.

    Args:
        case: to compute.
        device: "cuda" or "cpu".
        limit: of the distances; None is the mode's.
        decay, one_key: see `Case.inputs`.
    """
    inputs = case.inputs(device, decay=decay, one_key=one_key)
    state, dy, dfinal = cotangents(case, device)
    began = time.monotonic()
    found = launched(case, inputs, state, dy, dfinal)
    synchronize(device)
    launched_s = time.monotonic() - began
    wanted = reference(inputs, state, dy, dfinal)
    distances = {name: distance(x, y) for name, x, y in zip(NAMES, found, wanted, strict=True)}
    return judged(distances, limit or LIMITS[case.precision]) | {"launched_s": launched_s}


def timed_shape(case: Case, device: str) -> dict:
    """Check a case at its full size.

    Two heads of two rows against float64 over all tokens, two runs bit for bit, and narrow against wide blocks of rows
    over everything.
    """
    inputs = case.inputs(device)
    state, dy, dfinal = cotangents(case, device)
    found = launched(case, inputs, state, dy, dfinal)
    again = launched(case, inputs, state, dy, dfinal)
    equal = all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
    del again
    others = launched(narrow(case), inputs, state, dy, dfinal)
    blocks = max(distance(x, y.double()) for x, y in zip(found, others, strict=True))
    del others
    per = case.heads // (case.groups or case.heads)
    rows, group = slice(0, min(2, case.batch)), (case.groups or case.heads) - 1
    heads = slice(group * per, (group + 1) * per)

    def cut(x: Tensor) -> Tensor:
        return x[rows, :, heads] if x.shape[2] == case.heads else x[rows, :, group : group + 1]

    some = [cut(x) for x in inputs]
    wanted = reference(some, state[rows, heads], dy[rows, :, heads], dfinal[rows, heads])
    places = (cut, lambda x: x[rows, heads], *[cut] * 6, lambda x: x[rows, heads])
    distances = {name: distance(place(x), y) for name, place, x, y in zip(NAMES, places, found, wanted, strict=True)}
    result = judged(distances, LIMITS[case.precision])
    result |= {"bit_equal": equal, "blocks": blocks}
    result["ok"] = result["ok"] and equal and blocks <= LIMITS[case.precision]
    return result


def bounds(case: Case) -> list[int]:
    """Return where packed sequences begin and end; some are empty."""
    return [0, 0, 1, 18, 18, case.time, case.time]


def packed(case: Case, device: str) -> dict:
    """Compare packed sequences, empty ones among them, with each alone."""
    places = bounds(case)
    inputs = case.inputs(device)
    cu_seqlens = torch.tensor(places, dtype=torch.int32, device=device)
    y, _ = wkv7(*inputs, cu_seqlens=cu_seqlens, backend="triton", precision=case.precision)
    alone = []
    for start, end in zip(places[:-1], places[1:], strict=True):
        if end > start:
            part = [x[:, start:end].double() for x in inputs]
            zero = part[0].new_zeros(case.batch, case.heads, case.size, case.size)
            alone.append(wkv7_reference(*part, zero)[0])
    return judged({"y": distance(y, torch.cat(alone, 1))}, LIMITS[case.precision])


def masked(case: Case, device: str) -> dict:
    """Compare masked steps, with NaN where nothing may be read, with steps that do nothing."""
    inputs = case.inputs(device)
    mask = torch.ones(case.batch, case.time, dtype=torch.bool, device=device)
    mask[:, :5] = mask[:, 12:20] = mask[:, -3:] = False
    r, *rest = (x.double() for x in inputs)
    rest = [x.masked_fill(~mask[:, :, None, None], 0) for x in rest]
    zero = r.new_zeros(case.batch, case.heads, case.size, case.size)
    wanted, final = wkv7_reference(r, *rest, zero)
    wanted = wanted.masked_fill(~mask[:, :, None, None], 0)
    for x in inputs:
        x[~mask] = float("nan")
    y, state = wkv7(*inputs, mask=mask, backend="triton", precision=case.precision)
    return judged({"y": distance(y, wanted), "final": distance(state, final)}, LIMITS[case.precision])


def decoding(case: Case, device: str) -> dict:
    """Compare single steps, eager and as a CUDA graph, with the recurrence in float64."""
    inputs = case.inputs(device)
    state = torch.zeros(case.batch, case.heads, case.size, case.size, device=device)
    kept = state.clone()
    wanted, final = wkv7_reference(*(x.double() for x in inputs), state.double())
    found = capability(inputs[0].device)
    now = [x[:, 0].clone() for x in inputs]
    (launch,), y = plan_step(*now, kept, capability=found)
    replay = launch.run
    if device == "cuda":
        replay()  # compiles
        replay = captured(replay).replay
        kept.zero_()
    eager, graphed = [], []
    for t in range(case.time):
        step = [x[:, t] for x in inputs]
        (launch,), out = plan_step(*step, state, capability=found)
        launch.run()
        eager.append(out)
        for x, at in zip(now, step, strict=True):
            x.copy_(at)
        replay()
        graphed.append(y.clone())
    rows = {"y": distance(torch.stack(eager, 1), wanted), "final": distance(state, final)}
    rows["y of the graph"] = distance(torch.stack(graphed, 1), wanted)
    return judged(rows, 1e-5 if case.precision == "fp32" else 4e-3)


def one_token_of_a_mixer(preset: str, device: str, head_size: int, tokens: int) -> dict:
    """Compare single tokens of whole mixers with float64."""
    pairs = mixer_steps(preset, device, head_size, tokens)
    return judged({name: distance(found, wanted) for name, (found, wanted) in pairs.items()}, 1e-5)
