"""One token of the window beside a recurrence in one Triton launch: ring, attention, and the sum with the recurrence.

`rwkvinside.modeling.window_attention` has the equations and the layout of the ring, in PyTorch. A program owns a head
and reads the keys and values of its ring once, in fp32. With a score for what lies beyond the window, the recurrence is
the value of one more key of the softmax. The token's own key and value come from the arguments, so that
no program waits for the one that writes them into their slot. For inference only, there is no backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvinside.kernels.gpu.kernels import _store
from rwkvinside.kernels.gpu.launch import Launch, run
from rwkvinside.kernels.gpu.table import Tuning

SLOTS = {16: 64, 32: 64, 64: 64, 128: 32, 256: 16}  # keys that a program holds at a time, by padded head size
TUNING = Tuning(num_warps=4, num_stages=2)


@torch.library.custom_op("rwkvinside::window_step", mutates_args={"held_k", "held_v"})
def window_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    held_k: Tensor,
    held_v: Tensor,
    seen: Tensor,
    mix_recurrence: Tensor,
    mix_window: Tensor,
    sinks: int,
    mask: Tensor | None = None,
    far_key: Tensor | None = None,
    far_bias: Tensor | None = None,
    far_growth: Tensor | None = None,
) -> Tensor:
    """Attend with one token of every row to its window, and add the result to the recurrence's.

    Floating inputs may have any floating dtype but float64 and are computed in fp32; N is a multiple of 8, at most 256.

    Args:
        q: (B, H, N), normed and rotated.
        k, v: (B, G, N), the token's own, of which k is normed and rotated; head h reads head h // (H / G).
        y: (B, H * N), the gated output of the recurrence.
        held_k, held_v: (B, G, slots, N) contiguous, as in `WindowState`; the token is written into its slot.
        seen: (B,) int64, real tokens before this one; it is not changed.
        mix_recurrence, mix_window: (H, N), weights of y and of what is attended to.
        sinks: slots that keep the first tokens; the others are the ring.
        mask: (B,) bool, True for real tokens; elsewhere nothing is written and the output is 0.
        far_key, far_bias, far_growth: (H, N), (H,), (H,), all or none: the score of what lies beyond the window is
            q . far_key + far_bias + far_growth log(number of these tokens).

    Returns:
        (B, H * N) in y's dtype.

    Raises:
        ValueError: shapes, a dtype or a layout that do not fit.
    """
    far = far_key, far_bias, far_growth
    return launch_window_step(q, k, v, y, held_k, held_v, seen, mix_recurrence, mix_window, sinks, mask, *far)


@window_step.register_fake
def _(q, k, v, y, *others, **named):
    return torch.empty_like(y)


def launch_window_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    held_k: Tensor,
    held_v: Tensor,
    seen: Tensor,
    mix_recurrence: Tensor,
    mix_window: Tensor,
    sinks: int,
    mask: Tensor | None = None,
    far_key: Tensor | None = None,
    far_bias: Tensor | None = None,
    far_growth: Tensor | None = None,
) -> Tensor:
    """Do what `window_step` does without an operator's bookkeeping; arguments as there."""
    far = far_key, far_bias, far_growth
    launches, out = plan_window_step(q, k, v, y, held_k, held_v, seen, mix_recurrence, mix_window, sinks, mask, *far)
    run(launches, q.device)
    return out


def plan_window_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    held_k: Tensor,
    held_v: Tensor,
    seen: Tensor,
    mix_recurrence: Tensor,
    mix_window: Tensor,
    sinks: int,
    mask: Tensor | None = None,
    far_key: Tensor | None = None,
    far_bias: Tensor | None = None,
    far_growth: Tensor | None = None,
) -> tuple[list[Launch], Tensor]:
    """Return the launches that `window_step` runs, and its result; launch nothing.

    Meta tensors are enough. Arguments as there.
    """
    if q.dim() != 3 or q.shape[2] % 8 or not 8 <= q.shape[2] <= 256:
        raise ValueError(f"q has shape {tuple(q.shape)}, expected (B, H, N) with N a multiple of 8 from 8 to 256")
    (B, H, N), G, slots = q.shape, k.shape[1], held_k.shape[2]
    if not G or H % G:
        raise ValueError(f"k has shape {tuple(k.shape)}: its heads must divide the {H} of q")
    if not 0 <= sinks < slots:
        raise ValueError(f"{sinks} first tokens leave none of the {slots} slots to a window")
    shapes = {
        "q": (q, (B, H, N)), "k": (k, (B, G, N)), "v": (v, (B, G, N)), "y": (y, (B, H * N)),
        "mix_recurrence": (mix_recurrence, (H, N)), "mix_window": (mix_window, (H, N)),
        "held_k": (held_k, (B, G, slots, N)), "held_v": (held_v, (B, G, slots, N)),
    }  # fmt: skip
    far = {"far_key": (far_key, (H, N)), "far_bias": (far_bias, (H,)), "far_growth": (far_growth, (H,))}
    if (given := sum(x is not None for x, _ in far.values())) not in (0, len(far)):
        raise ValueError(f"{', '.join(far)}: {given} of them are given, give all or none")
    shapes |= {name: (x, shape) for name, (x, shape) in far.items() if x is not None}
    for name, (x, shape) in shapes.items():
        if x.shape != shape or x.dtype == torch.float64:
            raise ValueError(f"{name} has shape {tuple(x.shape)} and {x.dtype}, expected {shape} and not float64")
    if not held_k.is_contiguous() or not held_v.is_contiguous():
        raise ValueError("held_k and held_v must be contiguous: they are written to")
    if seen.shape != (B,) or seen.dtype != torch.int64:
        raise ValueError(f"seen has shape {tuple(seen.shape)} and {seen.dtype}, expected {(B,)} of int64")
    if mask is not None and (mask.shape != (B,) or mask.dtype != torch.bool):
        raise ValueError(f"mask has shape {tuple(mask.shape)} and {mask.dtype}, expected {(B,)} of bool")
    args = dict.fromkeys(far) | {name: x.contiguous() for name, (x, _) in shapes.items()}
    args |= {"seen": seen.contiguous(), "mask": None if mask is None else mask.contiguous(), "out": torch.empty_like(y)}
    args |= {"heads": H, "group": H // G, "slots": slots, "sinks": sinks}
    padded = max(16, triton.next_power_of_2(N))
    launch = Launch(_window_step, (B * H,), args, {"N": N, "K": padded, "BLOCK": SLOTS[padded]}, TUNING)
    return [launch], args["out"]


@triton.jit
def _window_step(
    q,
    k,
    v,
    y,
    mix_recurrence,
    mix_window,
    held_k,
    held_v,
    seen,
    mask,
    far_key,
    far_bias,
    far_growth,
    out,
    heads,
    group,
    slots,
    sinks,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head = tl.program_id(0) % heads
    batch = (tl.program_id(0) // heads).to(tl.int64)
    columns = tl.arange(0, K)
    inside = columns < N
    own = (batch * heads + head) * N + columns
    shared = batch * (heads // group) + head // group
    ring = shared * slots * N

    before = tl.load(seen + batch)
    slot = tl.where(before < sinks, before, sinks + (before - sinks) % (slots - sinks))
    new_k = tl.load(k + shared * N + columns, mask=inside, other=0.0).to(tl.float32)
    new_v = tl.load(v + shared * N + columns, mask=inside, other=0.0).to(tl.float32)
    read = tl.load(q + own, mask=inside, other=0.0).to(tl.float32)
    query = read * (N**-0.5)

    largest = -float("inf")
    total = 0.0
    beyond = -float("inf")
    if far_key is not None:
        count = before + 1 - slots
        against = tl.load(far_key + head * N + columns, mask=inside, other=0.0).to(tl.float32)
        growth = tl.load(far_growth + head).to(tl.float32) * tl.log(tl.maximum(count, 1).to(tl.float32))
        score = tl.sum(read * against, axis=0) + tl.load(far_bias + head).to(tl.float32) + growth
        beyond = tl.where(count > 0, score, -float("inf"))
        largest = beyond
        total = tl.where(count > 0, 1.0, 0.0)
    summed = tl.zeros((K,), dtype=tl.float32)
    for start in range(0, slots, BLOCK):
        at = start + tl.arange(0, BLOCK)
        places = ring + at[:, None] * N + columns[None, :]
        present = (at < slots)[:, None] & inside[None, :]
        is_new = (at == slot)[:, None]
        keys = tl.load(held_k + places, mask=present, other=0.0).to(tl.float32)
        keys = tl.where(is_new, new_k[None, :], keys)
        scores = tl.sum(keys * query[None, :], axis=1)
        scores = tl.where((at <= before) & (at < slots), scores, -float("inf"))  # those that hold something
        highest = tl.maximum(largest, tl.max(scores, axis=0))  # finite from the first block on: slot 0 holds something
        weights = tl.exp(scores - highest)
        shrunk = tl.exp(largest - highest)
        values = tl.load(held_v + places, mask=present, other=0.0).to(tl.float32)
        values = tl.where(is_new, new_v[None, :], values)
        summed = summed * shrunk + tl.sum(values * weights[:, None], axis=0)
        total = total * shrunk + tl.sum(weights, axis=0)
        largest = highest

    mixed = summed / total * tl.load(mix_window + head * N + columns, mask=inside, other=0.0).to(tl.float32)
    recurrence = tl.load(y + own, mask=inside, other=0.0).to(tl.float32)
    if far_key is not None:
        recurrence *= tl.exp(beyond - largest) / total
    mixed += recurrence * tl.load(mix_recurrence + head * N + columns, mask=inside, other=0.0).to(tl.float32)
    writes = inside & (head % group == 0)
    if mask is not None:
        real = tl.load(mask + batch)
        mixed = tl.where(real, mixed, 0.0)
        writes = writes & real
    _store(held_k + ring + slot * N + columns, new_k, writes)
    _store(held_v + ring + slot * N + columns, new_v, writes)
    _store(out + own, mixed, inside)
