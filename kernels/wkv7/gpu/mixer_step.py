"""One token of a whole RWKV-7 time mixer in one Triton launch, from its projections to its gated output.

Norm and rotation of receptance and key, the residual mixes with the first layer, decay, in-context learning rate, key
scale, recurrence, bonus and gate (`rwkvinside.modeling.time_mixer` has the equations, docs/mixer.md explains them), all
in fp32. The state is updated in place. For inference only, there is no backward.

Rows of the state are independent: a program owns a few rows of one head and computes the head's key vectors itself,
which reads some N numbers a dozen times, against N^2 of the state. The group norm of stock RWKV-7 is over all rows of a
head, so with it a program owns the head. Its token shift comes before the projections: `shift_step`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvinside.kernels.gpu.kernels import _store
from rwkvinside.kernels.gpu.launch import Launch, capability, run
from rwkvinside.kernels.gpu.table import StepConfig, lookup_step

DECAY_SCALE = tl.constexpr(math.exp(-0.5))
LARGEST_NORMED = 128  # columns of a head with a group norm: a program has all of its state in registers


@torch.library.custom_op("rwkvinside::wkv7_triton_mixer_step", mutates_args={"state", "k_out", "r_out"})
def mixer_step(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    iclr: Tensor,
    gate: Tensor,
    state: Tensor,
    w0: Tensor,
    a0: Tensor,
    r_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    v_mix: Tensor | None = None,
    v0: Tensor | None = None,
    v_first: Tensor | None = None,
    k_mix: Tensor | None = None,
    k0: Tensor | None = None,
    k_first: Tensor | None = None,
    r_k: Tensor | None = None,
    mask: Tensor | None = None,
    k_out: Tensor | None = None,
    norm_eps: float = 1e-6,
    log_scale: bool = False,
    r_out: Tensor | None = None,
    k_k: Tensor | None = None,
    k_a: Tensor | None = None,
    ln_weight: Tensor | None = None,
    ln_bias: Tensor | None = None,
    ln_eps: float = 64e-5,
) -> Tensor:
    """Take one step of a time mixer for every row of the batch.

    Floating inputs may have any floating dtype but float64 and are computed in fp32; N is a multiple of 8, at most 256.

    Args:
        r: (B, H, N), projected, neither normed nor rotated.
        k, v: (B, G, N), the same; G divides H, and head h reads head h // (H / G).
        decay, iclr, gate: (B, H * N), outputs of the low-rank maps; w0 and a0 are added to the first two.
        state: (B, H, N, N) fp32 as (value, key), contiguous; updated in place.
        w0, a0: H * N numbers.
        r_weight, k_weight: (N,), weights of the RMS norms; None without them.
        cos, sin: (B or 1, N), the rotation; None does not rotate.
        v_mix: (B, J * N), output of the value's low-rank map for J = G or H heads. With v_first it is the share (before
            v0 and the sigmoid) of v_first in v, without it a fifth of it is added to v.
        v0: J * N numbers, exactly when v_first is given.
        v_first: (B, G or H, N), value of the first RWKV layer.
        k_mix, k0, k_first: the same for the key, after its rotation: (B, G * N), G * N numbers, (B, G, N).
        r_k: (H, N), weights of the bonus; None without it.
        mask: (B,) bool, True for real tokens; elsewhere the state does not change and the output is 0.
        k_out: (B, G, N), takes the key after its rotation (before the mix): k_first of the later layers, and the key of
            a window.
        norm_eps: of the RMS norms.
        log_scale: the key's scale takes the decay in the log domain (key_scale "log"), else as it is ("decay").
        r_out: (B, H, N), takes the receptance after its rotation: the query of a window.
        k_k, k_a: H * N numbers each, learned scales of the key (key_scale "k_a", log_scale is then not read): of the
            key that is removed, and of the rate in the key that is written.
        ln_weight, ln_bias: H * N numbers each, of a group norm over each head in the place of N^-0.5; N is then at most
            `LARGEST_NORMED`.
        ln_eps: of the group norm.

    Returns:
        (B, H * N) in v's dtype, gated, before the output projection.

    Raises:
        ValueError: shapes, a dtype or a layout that do not fit.
    """
    return launch_mixer_step(
        r, k, v, decay, iclr, gate, state, w0, a0, r_weight, k_weight, cos, sin, v_mix, v0, v_first, k_mix, k0, k_first,
        r_k, mask, k_out, norm_eps, log_scale, r_out, k_k, k_a, ln_weight, ln_bias, ln_eps,
    )  # fmt: skip


@mixer_step.register_fake
def _(r, k, v, decay, *others, **named):
    return torch.empty_like(decay, dtype=v.dtype)


def launch_mixer_step(r: Tensor, k: Tensor, v: Tensor, decay: Tensor, *others: Any, **named: Any) -> Tensor:
    """Do what `mixer_step` does without an operator's bookkeeping, which takes Python longer than all the rest."""
    launches, y = plan_mixer_step(r, k, v, decay, *others, **named, capability=capability(r.device))
    run(launches, r.device)
    return y


def plan_mixer_step(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    iclr: Tensor,
    gate: Tensor,
    state: Tensor,
    w0: Tensor,
    a0: Tensor,
    r_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    v_mix: Tensor | None = None,
    v0: Tensor | None = None,
    v_first: Tensor | None = None,
    k_mix: Tensor | None = None,
    k0: Tensor | None = None,
    k_first: Tensor | None = None,
    r_k: Tensor | None = None,
    mask: Tensor | None = None,
    k_out: Tensor | None = None,
    norm_eps: float = 1e-6,
    log_scale: bool = False,
    r_out: Tensor | None = None,
    k_k: Tensor | None = None,
    k_a: Tensor | None = None,
    ln_weight: Tensor | None = None,
    ln_bias: Tensor | None = None,
    ln_eps: float = 64e-5,
    *,
    capability: tuple[int, int] | None,
    config: StepConfig | None = None,
) -> tuple[list[Launch], Tensor]:
    """Return the launches that `mixer_step` runs, and its result; launch nothing.

    Meta tensors are enough.

    Args:
        r ... ln_eps: as in `mixer_step`.
        capability: compute capability to plan for; None is Triton's interpreter.
        config: replaces the table's.
    """
    if r.dim() != 3 or r.shape[2] % 8 or not 8 <= r.shape[2] <= 256:
        raise ValueError(f"r has shape {tuple(r.shape)}, expected (B, H, N) with N a multiple of 8 from 8 to 256")
    B, H, N = r.shape
    G = k.shape[1]
    if not G or H % G:
        raise ValueError(f"k has shape {tuple(k.shape)}: its heads must divide the {H} of r")
    if (v_first is None) != (v0 is None) or v_first is not None and v_mix is None:
        raise ValueError("v0 and v_first come together, and with v_mix")
    for names, parts in (
        ("k_mix, k0 and k_first", (k_mix, k0, k_first)),
        ("k_k and k_a", (k_k, k_a)),
        ("ln_weight and ln_bias", (ln_weight, ln_bias)),
    ):
        if len({x is None for x in parts}) > 1:
            raise ValueError(f"{names} come together")
    if ln_weight is not None and N > LARGEST_NORMED:
        raise ValueError(f"heads of {N} with a group norm: at most {LARGEST_NORMED}")
    J = G if v_mix is None else v_mix.shape[1] // N
    F = G if v_first is None else v_first.shape[1]
    if {J, F} - {G, H}:
        raise ValueError(f"v_mix has {J} heads and v_first {F}: each must have the {G} of v or the {H} of r")
    rows, width = (B, H * N), H * N
    shapes = {
        "r": (r, (B, H, N)), "k": (k, (B, G, N)), "v": (v, (B, G, N)), "decay": (decay, rows), "iclr": (iclr, rows),
        "gate": (gate, rows), "v_mix": (v_mix, (B, J * N)), "v_first": (v_first, (B, F, N)),
        "k_mix": (k_mix, (B, G * N)), "k_first": (k_first, (B, G, N)), "r_weight": (r_weight, (N,)),
        "k_weight": (k_weight, (N,)), "r_k": (r_k, (H, N)),
    }  # fmt: skip
    args = {name: _contiguous(name, x, shape) for name, (x, shape) in shapes.items()}
    for name, x, count in (
        *(("w0", w0, width), ("a0", a0, width), ("v0", v0, J * N), ("k0", k0, G * N)),
        *(("k_k", k_k, width), ("k_a", k_a, width), ("ln_weight", ln_weight, width), ("ln_bias", ln_bias, width)),
    ):
        args[name] = None if x is None else _contiguous(name, x.flatten(), (count,))
    args |= _rotation(cos, sin, B, N) | {"k_out": k_out, "r_out": r_out, "mask": mask, "state": state}
    _check_outputs(state, k_out, r_out, mask, (B, H, G, N))

    y = torch.empty(B, width, dtype=v.dtype, device=v.device)
    args |= {"y": y, "heads": H, "group": H // G, "v_mix_group": H // J, "v_first_group": H // F}
    padded = max(16, triton.next_power_of_2(N))
    config = config or lookup_step(padded, capability)
    block, tuning = min(config.block_v, padded), config.step
    if ln_weight is not None:  # all rows of the head, no more than 64 numbers of its state in a thread
        block, tuning = padded, dataclasses.replace(tuning, num_warps=max(tuning.num_warps, padded // 16))
    blocks = triton.cdiv(N, block)
    constants = {"N": N, "K": padded, "BLOCK": block, "BLOCKS": blocks, "EPS": norm_eps, "LOG_SCALE": log_scale}
    # One axis: a grid's second axis ends at 65535, which B * H may exceed.
    launch = Launch(_mixer_step, (blocks * B * H,), args, constants | {"LN_EPS": ln_eps}, tuning)
    return [launch], y


def _contiguous(name: str, x: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    if x is None:
        return None
    if x.shape != shape or x.dtype == torch.float64:
        raise ValueError(f"{name} has shape {tuple(x.shape)} and {x.dtype}, expected {shape} and not float64")
    return x.contiguous()


def _rotation(cos: Tensor | None, sin: Tensor | None, B: int, N: int) -> dict:
    """Return the arguments of the rotation; one of a single row serves the whole batch."""
    if cos is None or sin is None:
        if cos is not sin:
            raise ValueError("cos and sin come together")
        return {"cos": None, "sin": None, "rotation_batch": None}
    for name, x in (("cos", cos), ("sin", sin)):
        if x.shape not in ((1, N), (B, N)) or x.shape != cos.shape or x.dtype == torch.float64:
            raise ValueError(f"{name} has shape {tuple(x.shape)} and {x.dtype}, expected {(B, N)} or {(1, N)}")
    return {"cos": cos.contiguous(), "sin": sin.contiguous(), "rotation_batch": N if cos.shape[0] > 1 else 0}


def _check_outputs(
    state: Tensor,
    k_out: Tensor | None,
    r_out: Tensor | None,
    mask: Tensor | None,
    sizes: tuple[int, int, int, int],
) -> None:
    B, H, G, N = sizes
    if state.shape != (B, H, N, N) or state.dtype != torch.float32 or not state.is_contiguous():
        raise ValueError(
            f"state has shape {tuple(state.shape)}, {state.dtype} and strides {state.stride()}, expected "
            f"{(B, H, N, N)} in float32, contiguous"
        )
    for name, x, heads in (("k_out", k_out, G), ("r_out", r_out, H)):
        if x is not None and (x.shape != (B, heads, N) or not x.is_contiguous()):
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {(B, heads, N)}, contiguous")
    if mask is not None and (mask.shape != (B,) or mask.dtype != torch.bool or not mask.is_contiguous()):
        raise ValueError(f"mask has shape {tuple(mask.shape)} and {mask.dtype}, expected {(B,)} of bool, contiguous")


@triton.jit
def _load(pointer, inside):
    return tl.load(pointer, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _normed_and_rotated(x, weight, cos, sin, columns, inside, N: tl.constexpr, EPS: tl.constexpr):
    """Return one head of receptance or key in fp32; the rotation pairs columns half a head apart."""
    value = _load(x + columns, inside)
    partners = tl.where(columns < N // 2, columns + N // 2, columns - N // 2)
    sign = tl.where(columns < N // 2, -1.0, 1.0)
    scale = 1.0
    if weight is not None:
        scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / N + EPS)
        value = value * scale * _load(weight + columns, inside)
    if cos is not None:
        turned = _load(x + partners, inside) * sign
        if weight is not None:
            turned = turned * scale * _load(weight + partners, inside)
        value = value * _load(cos + columns, inside) + turned * _load(sin + columns, inside)
    return value


@triton.jit
def _mixer_step(
    r,
    k,
    v,
    decay,
    iclr,
    gate,
    state,
    w0,
    a0,
    r_weight,
    k_weight,
    cos,
    sin,
    v_mix,
    v0,
    v_first,
    k_mix,
    k0,
    k_first,
    r_k,
    k_k,
    k_a,
    ln_weight,
    ln_bias,
    mask,
    k_out,
    r_out,
    y,
    heads,
    group,
    v_mix_group,
    v_first_group,
    rotation_batch,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    EPS: tl.constexpr,
    LOG_SCALE: tl.constexpr,
    LN_EPS: tl.constexpr,
):
    program = tl.program_id(0)
    head = (program // BLOCKS) % heads
    batch = (program // BLOCKS // heads).to(tl.int64)
    rows = (program % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, K)
    in_rows = rows < N
    in_columns = columns < N
    own = (batch * heads + head) * N  # of this head where all heads have their own
    shared = (batch * (heads // group) + head // group) * N

    # The state first: it is nearly all of the traffic, and its load depends on nothing else.
    places = state + own * N + rows[:, None] * N + columns[None, :]
    inside = in_rows[:, None] & in_columns[None, :]
    S = tl.load(places, mask=inside, other=0.0)

    if cos is not None:
        cos += batch * rotation_batch
        sin += batch * rotation_batch
    rt = _normed_and_rotated(r + own, r_weight, cos, sin, columns, in_columns, N, EPS)
    kt = _normed_and_rotated(k + shared, k_weight, cos, sin, columns, in_columns, N, EPS)
    if k_out is not None:
        writes = in_columns & (program % BLOCKS == 0) & (head % group == 0)
        _store(k_out + shared + columns, kt, writes)
    if r_out is not None:
        _store(r_out + own + columns, rt, in_columns & (program % BLOCKS == 0))
    if k_first is not None:
        bias = _load(k0 + head // group * N + columns, in_columns)
        share = tl.sigmoid(bias + _load(k_mix + shared + columns, in_columns))
        kt += (_load(k_first + shared + columns, in_columns) - kt) * share
    vt = _load(v + shared + rows, in_rows)
    if v_mix is not None:
        mixed = _load(v_mix + (batch * (heads // v_mix_group) + head // v_mix_group) * N + rows, in_rows)
        if v_first is not None:
            first = v_first + (batch * (heads // v_first_group) + head // v_first_group) * N
            bias = _load(v0 + head // v_mix_group * N + rows, in_rows)
            vt += (_load(first + rows, in_rows) - vt) * tl.sigmoid(bias + mixed)
        else:
            vt += 0.2 * mixed

    z = _load(w0 + head * N + columns, in_columns) + _load(decay + own + columns, in_columns)
    kept = tl.exp(tl.sigmoid(z) * -DECAY_SCALE)
    rate = tl.sigmoid(_load(a0 + head * N + columns, in_columns) + _load(iclr + own + columns, in_columns))
    kk = kt
    if k_k is not None:
        kk *= _load(k_k + head * N + columns, in_columns)
    kk /= tl.maximum(tl.sqrt(tl.sum(kk * kk, axis=0)), 1e-12)
    if k_a is not None:
        kt *= 1.0 + (rate - 1.0) * _load(k_a + head * N + columns, in_columns)
    else:
        log_sigmoid = tl.minimum(z, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(z)))
        kt *= 1.0 - (log_sigmoid - 0.5 if LOG_SCALE else kept) + rate

    removed = -tl.sum(S * kk[None, :], axis=1)
    S = S * kept[None, :] + removed[:, None] * (rate * kk)[None, :] + vt[:, None] * kt[None, :]
    yt = tl.sum(S * rt[None, :], axis=1)
    if ln_weight is not None:
        yt = tl.where(in_rows, yt - tl.sum(yt, axis=0) / N, 0.0)
        yt /= tl.sqrt(tl.sum(yt * yt, axis=0) / N + LN_EPS)
        yt = yt * _load(ln_weight + head * N + rows, in_rows) + _load(ln_bias + head * N + rows, in_rows)
    else:
        yt *= N**-0.5
    if r_k is not None:
        yt += tl.sum(rt * kt * _load(r_k + head * N + columns, in_columns), axis=0) * vt
    yt *= _load(gate + own + rows, in_rows)
    if mask is not None:
        real = tl.load(mask + batch)
        yt = tl.where(real, yt, 0.0)
        inside = inside & real
    tl.store(places, S, mask=inside)
    _store(y + own + rows, yt, in_rows)
