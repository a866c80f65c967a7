"""The work around the WKV-7 recurrence as PyTorch ops: its inputs from projections, and what follows its output.

Each is one launch forward and one backward, after the products that finish its low-rank maps. The backward computes
all of it again: what is kept are projections, the narrow sides of low-rank maps, and the recurrence's output. The
equations are those of `rwkvinside.modeling.time_mixer`, computed in fp32 on tensors of any floating dtype. As in
`op.py`, plans describe launches without launching them, for a GPU that need not be there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from rwkvinside.kernels.gpu import mixer_kernels as kernels
from rwkvinside.kernels.gpu.kernels import INTERPRETED
from rwkvinside.kernels.gpu.launch import Launch, run
from rwkvinside.kernels.gpu.table import Tuning

KEY_SCALES = ("decay", "log", "k_a")


@dataclass(frozen=True)
class Work:
    """How much of a kernel's work a program does at a time, and all in all.

    Attributes:
        tokens: of a program, at least; it goes over them in blocks.
        warps: of a program. A block has `COLUMNS` columns for each of their threads.
        max_registers: of a thread, so that more programs fit on a multiprocessor; None: as many as ptxas likes.
    """

    tokens: int
    warps: int
    max_registers: int | None = None

    def blocks(self, size: int) -> tuple[int, int]:
        """Return the tokens of a block, a power of two, and the blocks of a program, for heads of a size."""
        block = max(1, 32 * self.warps * COLUMNS // (2 * _half(size)))
        return block, triton.cdiv(self.tokens, block)

    def programs(self, tokens: int, size: int) -> int:
        """Return the programs for each group of heads."""
        return triton.cdiv(tokens, math.prod(self.blocks(size)))


COLUMNS = 4  # of a thread: 16 bytes of fp32 are the most that it loads at once, and one layout suits all tensors
# By the name of the kernel, the fastest of some on an H200 (docs/measurements). A warp that is alone waits for none,
# and 16 tokens share a row of sums for each parameter.
DEFAULTS = {
    "inputs_forward": Work(tokens=4, warps=4),
    "inputs_backward": Work(tokens=16, warps=1),
    "output_forward": Work(tokens=4, warps=4),
    "output_backward": Work(tokens=4, warps=1),
}
MIXED_BACKWARD = Work(tokens=16, warps=1)  # of `output_backward` with a window: it has sums, too; not yet measured

# What the kernels of `inputs` read, per token and then parameters. Absent tensors are not in a call's list.
TOKENS = ("r", "k", "v", "decay", "iclr", "key_gate", "k_first", "value_gate", "v_first", "cos", "sin")
PARAMETERS = ("r_norm", "k_norm", "w0", "a0", "k0", "v0", "r_k", "k_k", "k_a")
LOW_RANK = ("decay", "iclr", "key_gate", "value_gate")  # products, whose factors the ops take as NAME and NAME_up
OUTPUTS = ("r", "w", "k", "v", "a", "b", "bonus", "key")

Factors = tuple[Tensor, Tensor]  # of a low-rank map's result: (B, T, rank) and the matrix (rank, heads * N)


class RecurrenceTensors(NamedTuple):
    """The inputs of the recurrence, and what goes past it.

    r, log_decay (fp32), k and b are (B, T, H, N); v is (B, T, G or H, N); a is (B, T, G, N), or (B, T, H, N) with
    "k_a". bonus, the weight of the current token's v, is (B, T, H) in fp32; None without r_k. key is the key before its
    residual mix, (B, T, G, N), None where it was not asked for.
    """

    r: Tensor
    log_decay: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    bonus: Tensor | None
    key: Tensor | None


def inputs(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Factors,
    iclr: Factors,
    *,
    w0: Tensor,
    a0: Tensor,
    key_scale: str,
    eps: float = 1e-6,
    hand_key: bool = False,
    r_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    key_gate: Factors | None = None,
    k_first: Tensor | None = None,
    k0: Tensor | None = None,
    value_gate: Factors | None = None,
    v_first: Tensor | None = None,
    v0: Tensor | None = None,
    r_k: Tensor | None = None,
    k_k: Tensor | None = None,
    k_a: Tensor | None = None,
) -> RecurrenceTensors:
    """Compute the inputs of the recurrence from projections of a layer's input.

    Norm, rotation, residual mixes with the first layer, decay, in-context rate, unit key and key scale; equations as in
    docs/mixer.md.

    Args:
        r: (B, T, H, N), bf16, fp16 or fp32, with any strides that let batch and time be joined; N a multiple of 8.
            The outputs have its dtype, other than log_decay and bonus.
        k, v: (B, T, G, N) with G dividing H.
        decay, iclr: factors of (B, T, H * N), which are added to w0 and a0. A product has the dtype of its first.
        w0, a0, k_k, k_a: H * N values each.
        key_scale: "decay", "log" or "k_a"; the last needs k_k and k_a.
        eps: of the norms.
        hand_key: also return the key before its residual mix.
        r_norm, k_norm: (N,), weights of RMS norms; None: no norm.
        cos, sin: (B or 1, T, N); None: no rotation.
        key_gate, k_first, k0: factors of (B, T, G * N), (B, T, G, N), and G * N values: mix in k_first by
            sigmoid(k0 + key_gate).
        value_gate: factors of (B, T, G * N or H * N). With v_first, (B, T, heads, N) with as many heads or G, and v0:
            mix in v_first by sigmoid(v0 + value_gate). Without: add 0.2 of it. None: v stays as it is, not copied.
        r_k: (H, N), weights of the bonus.

    Returns:
        See `RecurrenceTensors`. All carry gradient to all inputs but cos and sin; there is no second derivative.

    Raises:
        ValueError: shapes or dtypes that do not fit, tensors that belong together of which some are missing.
    """
    given = dict(
        r=r, k=k, v=v, k_first=k_first, v_first=v_first, cos=cos, sin=sin, r_norm=r_norm, k_norm=k_norm, w0=w0, a0=a0,
        k0=k0, v0=v0, r_k=r_k, k_k=k_k, k_a=k_a,
    )  # fmt: skip
    for name, factors in zip(LOW_RANK, (decay, iclr, key_gate, value_gate), strict=True):
        if factors is not None:
            given[name], given[f"{name}_up"] = factors
    given = {name: x for name, x in given.items() if x is not None}
    _check_inputs(given, key_scale)
    found = _inputs(list(given.values()), " ".join(given), key_scale, eps, hand_key)
    out = dict(zip(_output_names(given, hand_key), found, strict=True))
    return RecurrenceTensors(
        out["r"], out["w"], out["k"], out.get("v", v), out["a"], out["b"], out.get("bonus"), out.get("key")
    )


class Mixed(NamedTuple):
    """What a window gives, and how the recurrence and it are mixed.

    Attributes:
        near: (B, T, H, N), values that were attended to.
        weight: (B, T, H, 1) fp32, of the recurrence in the window's softmax; None: one.
        mix_recurrence, mix_window: (H, N), weights of both.
    """

    near: Tensor
    weight: Tensor | None
    mix_recurrence: Tensor
    mix_window: Tensor


def output(
    y: Tensor,
    gate: Factors,
    *,
    scale: float,
    bonus: Tensor | None = None,
    v: Tensor | None = None,
    mixed: Mixed | None = None,
) -> Tensor:
    """Return (scale * y + bonus * v) * gate, or with a window mix_recurrence * weight * that + mix_window * near.

    Args:
        y: (B, T, H, N), of the recurrence.
        gate: factors of (B, T, H * N).
        scale: of y.
        bonus: (B, T, H) fp32 from `inputs`; None: no bonus, and v is not read.
        v: (B, T, G or H, N), of the recurrence.
        mixed: the window; None: there is none.

    Returns:
        (B, T, H, N) in the dtype of the gate, with gradient to all tensors.
    """
    if (bonus is None) != (v is None):
        raise ValueError("a bonus needs v, and v is read for a bonus only")
    return _output(y, *gate, bonus, v, *(mixed or (None,) * 4), scale)


def plan_inputs(
    given: dict[str, Tensor],
    *,
    key_scale: str,
    eps: float = 1e-6,
    hand_key: bool = False,
    work: Work = DEFAULTS["inputs_forward"],
) -> tuple[list[Launch], dict[str, Tensor]]:
    """Return the launches of `inputs` and its outputs by their names in `OUTPUTS`; launch nothing.

    Meta tensors are enough.

    Args:
        given: what `TOKENS` and `PARAMETERS` name, without absent ones. Products of low-rank maps are (B, T, heads, N).
        key_scale, eps, hand_key: as in `inputs`.
        work: of a program.
    """
    layout = _Layout(given, key_scale)
    r = given["r"]
    heads = layout.output_heads(hand_key)
    out = {name: r.new_empty(*r.shape[:2], count, layout.size) for name, count in heads.items()}
    out["w"] = r.new_empty(r.shape, dtype=torch.float32)
    if "r_k" in given:
        out["bonus"] = r.new_empty(r.shape[:3], dtype=torch.float32)
    out = {name: out[name] for name in OUTPUTS if name in out}
    places = {f"{name}_out_": out.get(name) for name in OUTPUTS[:6]}
    places |= {f"{name}_": out.get(name) for name in OUTPUTS[6:]}
    return [layout.launch(kernels.inputs_forward, places, eps, work)], out


def plan_inputs_backward(
    given: dict[str, Tensor],
    grads: dict[str, Tensor],
    *,
    key_scale: str,
    eps: float = 1e-6,
    wanted: set[str],
    work: Work = DEFAULTS["inputs_backward"],
) -> tuple[list[Launch], dict[str, Tensor], Tensor, dict[str, slice]]:
    """Return the launches of the backward of `inputs` and where they write; launch nothing.

    Args:
        given, key_scale, eps: as in `plan_inputs`.
        grads: of all outputs, by name.
        wanted: names of inputs that need a gradient. Only k_first and v_first go without if they do not.
        work: of a program.

    Returns:
        Launches, gradients of what is per token by name, sums over a program's tokens (programs, rows, N) fp32 of the
        gradients of parameters, and the rows of each parameter; those of the norms are still to be added.
    """
    layout = _Layout(given, key_scale)
    out = {name: given[name].new_empty(given[name].shape) for name in layout.differentiated(wanted)}
    rows = layout.parameter_rows()
    sums = layout.empty_sums(work)
    places: dict[str, Any] = {}
    own = {name: grads[name].contiguous() if name in grads else None for name in OUTPUTS}
    places |= {f"d{name}_out_": own[name] for name in OUTPUTS[:6]}
    places |= {f"d{name}_": own[name] for name in OUTPUTS[6:]}
    places |= {f"d{name}_": out.get(name) for name in TOKENS[:9]}
    places |= {f"d{name}_": sums[:, rows[name]] if name in rows else None for name in PARAMETERS}
    places["sums_t"] = sums.stride(0)
    return [layout.launch(kernels.inputs_backward, places, eps, work)], out, sums, rows


def plan_output(
    y: Tensor,
    gate: Tensor,
    bonus: Tensor | None,
    v: Tensor | None,
    scale: float,
    mixed: Mixed | None = None,
    work: Work = DEFAULTS["output_forward"],
) -> tuple[list[Launch], Tensor]:
    """Return the launches of `output` and its result; launch nothing."""
    out = gate.new_empty(gate.shape)
    places = _output_places(y, gate, bonus, v, mixed) | {"out_": out}
    return [_output_launch(kernels.output_forward, y, v, scale, places, work)], out


def plan_output_backward(
    y: Tensor,
    gate: Tensor,
    bonus: Tensor | None,
    v: Tensor | None,
    scale: float,
    dout: Tensor,
    mixed: Mixed | None = None,
    work: Work | None = None,
) -> tuple[list[Launch], dict[str, Tensor]]:
    """Return the launches of the backward of `output`, and the gradients of all tensors that there are, by name.

    Those of the two mixes are "sums" over a program's tokens, (programs, 2, H, N) fp32.
    """
    work = work or (DEFAULTS["output_backward"] if mixed is None else MIXED_BACKWARD)
    given = {"y": y, "gate": gate, "bonus": bonus, "v": v}
    given |= {} if mixed is None else {"near": mixed.near, "weight": mixed.weight}
    grads = {name: x.new_empty(x.shape) for name, x in given.items() if x is not None}
    if mixed is not None:
        _, _, H, N = y.shape
        grads["sums"] = y.new_empty(work.programs(y.shape[0] * y.shape[1], N), 2, H, N, dtype=torch.float32)
    places = _output_places(y, gate, bonus, v, mixed) | _strided("dout", dout) | {"sums_": grads.get("sums")}
    places |= {f"d{name}_": grads.get(name) for name in ("y", "gate", "bonus", "v", "near", "weight")}
    return [_output_launch(kernels.output_backward, y, v, scale, places, work)], grads


def _output_places(
    y: Tensor, gate: Tensor, bonus: Tensor | None, v: Tensor | None, mixed: Mixed | None
) -> dict[str, Any]:
    near, weight, *mixes = mixed or (None,) * 4
    places = {**_strided("y", y), **_strided("gate", gate), **_strided("bonus", bonus), **_strided("v", v)}
    places |= {**_strided("near", near), **_strided("weight", None if weight is None else weight.squeeze(3))}
    names = "mix_recurrence_", "mix_window_"
    return places | {name: None if x is None else x.contiguous() for name, x in zip(names, mixes, strict=True)}


def _output_launch(kernel, y: Tensor, v: Tensor | None, scale: float, places: dict[str, Any], work: Work) -> Launch:
    B, T, H, N = y.shape
    shared = H if v is None else v.shape[2]
    return _launch(kernel, {**places, "scale": scale}, {"R": H // shared}, B * T, shared, N, work)


def _launch(
    kernel, args: dict[str, Any], constants: dict[str, Any], tokens: int, groups: int, size: int, work: Work
) -> Launch:
    """Return a launch of one program for each of the tokens that `work` gives it and each group of heads."""
    block, blocks = work.blocks(size)
    constants = {**constants, "BLOCK": block, "BLOCKS": blocks, "D": size, "P": _half(size)}
    args = {**args, "G": groups, "TOKENS": tokens}
    tuning = Tuning(work.warps, 1, work.max_registers)
    return Launch(kernel, (work.programs(tokens, size) * groups,), args, constants, tuning)


def _half(size: int) -> int:
    """Return half of a head, padded to a power of two."""
    return triton.next_power_of_2(size // 2)


def _strided(name: str, x: Tensor | None) -> dict[str, Any]:
    """Return a tensor (B, T, heads, N), or (B, T, heads), as the kernels take it; strides of 0 if it is absent."""
    if x is None:
        return {f"{name}_": None, f"{name}_t": 0, f"{name}_h": 0}
    x = x.flatten(0, 1)
    x = x if x.dim() == 2 or x.stride(2) == 1 else x.contiguous()
    return {f"{name}_": x, f"{name}_t": x.stride(0), f"{name}_h": x.stride(1)}


class _Layout:
    """Sizes of a call of `inputs`, and where the gradients of parameters lie; factors or products are given."""

    def __init__(self, given: dict[str, Tensor], key_scale: str):
        self.given, self.key_scale = given, key_scale
        batch, time, self.heads, self.size = given["r"].shape
        self.tokens = batch * time
        self.groups = given["k"].shape[2]
        self.value_heads = self.groups
        if "value_gate_up" in given:
            self.value_heads = given["value_gate_up"].shape[1] // self.size
        elif "value_gate" in given:
            self.value_heads = given["value_gate"].shape[2]

    def output_heads(self, hand_key: bool) -> dict[str, int]:
        """Return the outputs that are rows of N columns, and how many heads they have."""
        heads = {"r": self.heads, "w": self.heads, "k": self.heads, "b": self.heads}
        heads["a"] = self.heads if self.key_scale == "k_a" else self.groups
        heads |= {"v": self.value_heads} if "value_gate" in self.given else {}
        return heads | ({"key": self.groups} if hand_key else {})

    def differentiated(self, wanted: set[str]) -> list[str]:
        """Return the tensors per token, and factors, that get a gradient.

        These are all, but v_first and k_first only if they are wanted.
        """
        without = {"v_first", "k_first"} - wanted
        if "value_gate" not in self.given:
            without.add("v")  # it is not touched
        names = (*TOKENS[:9], *(f"{name}_up" for name in LOW_RANK))
        return [name for name in names if name in self.given and name not in without]

    def parameter_rows(self) -> dict[str, slice]:
        """Return the rows of each parameter in the buffer of their gradients' sums."""
        counts = dict.fromkeys(PARAMETERS, self.heads)
        counts |= {"r_norm": self.groups, "k_norm": self.groups, "k0": self.groups, "v0": self.value_heads}
        rows, start = {}, 0
        for name in PARAMETERS:
            if name in self.given:
                rows[name] = slice(start, start + counts[name])
                start += counts[name]
        return rows

    def parameters(self) -> int:
        """Return the rows of the buffer of parameters' gradients."""
        return list(self.parameter_rows().values())[-1].stop

    def empty_sums(self, work: Work) -> Tensor:
        """Return the buffer of parameters' gradients, for each program of a group by itself (programs, rows, N)."""
        programs = work.programs(self.tokens, self.size)
        return self.given["r"].new_empty(programs, self.parameters(), self.size, dtype=torch.float32)

    def launch(self, kernel, places: dict[str, Any], eps: float, work: Work) -> Launch:
        """Return a launch that reads all inputs, with products of low-rank maps."""
        given = self.given
        args: dict[str, Any] = {}
        for name in TOKENS[:9]:
            x = given.get(name)
            args |= {f"{name}_": None if x is None else x.contiguous()} if name in LOW_RANK else _strided(name, x)
        first = given.get("v_first")
        group = 1 if first is None else self.value_heads // first.shape[2]
        positions = 1
        for name in ("cos", "sin"):
            x = given.get(name)
            x = None if x is None else x.flatten(0, 1)
            args |= {f"{name}_": x, f"{name}_t": 0 if x is None else x.stride(0)}
            positions = positions if x is None else x.shape[0]
        args |= {f"{name}_": given[name].contiguous() if name in given else None for name in PARAMETERS}
        args |= {**places, "eps": eps, "POSITIONS": positions}
        constants = {"R": self.heads // self.groups, "RV": self.value_heads // self.groups, "FIRST": group}
        constants = {**constants, "KEY_SCALE": self.key_scale}
        return _launch(kernel, args, constants, self.tokens, self.groups, self.size, work)


def _multiplied(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what the kernels read: products in the place of their factors."""
    size = given["r"].shape[3]
    read = {name: x for name, x in given.items() if not name.endswith("_up")}
    for name in LOW_RANK:
        if name in given:
            read[name] = _product(given[name], given[f"{name}_up"], size)
    return read


def _product(low: Tensor, up: Tensor, size: int) -> Tensor:
    """Return the product of factors as (B, T, heads, N)."""
    return (low.flatten(0, 1) @ up.to(low.dtype)).view(*low.shape[:2], -1, size)


def _factor_gradients(grad: Tensor, low: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of factors from that of their product."""
    grad = grad.view(-1, up.shape[1])
    return (grad @ up.to(grad.dtype).mT).view(low.shape), (low.flatten(0, 1).mT @ grad).to(up.dtype)


@torch.library.custom_op("rwkvinside::mixer_inputs_triton", mutates_args=())
def _inputs(tensors: list[Tensor], names: str, key_scale: str, eps: float, hand_key: bool) -> list[Tensor]:
    given = _multiplied(dict(zip(names.split(), tensors, strict=True)))
    launches, out = plan_inputs(given, key_scale=key_scale, eps=eps, hand_key=hand_key)
    run(launches, given["r"].device)
    return list(out.values())


@_inputs.register_fake
def _(tensors, names, key_scale, eps, hand_key):
    given = _multiplied(dict(zip(names.split(), tensors, strict=True)))
    return list(plan_inputs(given, key_scale=key_scale, eps=eps, hand_key=hand_key)[1].values())


@torch.library.custom_op("rwkvinside::mixer_inputs_triton_backward", mutates_args=())
def _inputs_backward(
    tensors: list[Tensor], names: str, grads: list[Tensor], outputs: str, key_scale: str, eps: float, wanted: str
) -> list[Tensor]:
    given = dict(zip(names.split(), tensors, strict=True))
    launches, out, sums, _ = plan_inputs_backward(
        _multiplied(given),
        dict(zip(outputs.split(), grads, strict=True)),
        key_scale=key_scale,
        eps=eps,
        wanted=set(wanted.split()),
    )
    run(launches, sums.device)
    for name in LOW_RANK:
        if name in out:
            up = f"{name}_up"
            out[name], out[up] = _factor_gradients(out[name], given[name], given[up])
    return [*(out[name] for name in given if name in out), sums.sum(0)]


@_inputs_backward.register_fake
def _(tensors, names, grads, outputs, key_scale, eps, wanted):
    given = dict(zip(names.split(), tensors, strict=True))
    layout = _Layout(given, key_scale)
    made = layout.differentiated(set(wanted.split()))
    grads = [x.new_empty(x.shape) for name, x in given.items() if name in made]
    return [*grads, given["r"].new_empty(layout.parameters(), layout.size, dtype=torch.float32)]


def _setup_inputs(ctx, inputs, output) -> None:
    tensors, ctx.names, ctx.key_scale, ctx.eps, hand_key = inputs
    ctx.save_for_backward(*tensors)
    ctx.outputs = " ".join(_output_names(ctx.names.split(), hand_key))


def _differentiate_inputs(ctx, grads):
    tensors, names = list(ctx.saved_tensors), ctx.names.split()
    given = dict(zip(names, tensors, strict=True))
    wanted = {name for name, needed in zip(names, ctx.needs_input_grad[0], strict=True) if needed}
    *found, total = _inputs_backward(
        tensors, ctx.names, grads, ctx.outputs, ctx.key_scale, ctx.eps, " ".join(sorted(wanted))
    )
    layout = _Layout(given, ctx.key_scale)
    made = layout.differentiated(wanted)
    by_name: dict[str, Tensor | None] = dict(zip((name for name in names if name in made), found, strict=True))
    rows = layout.parameter_rows()
    if "r_norm" in rows:  # the first rows of all; each group has its own sum
        norms = total[: 2 * layout.groups].view(2, layout.groups, -1).sum(1)
        by_name |= dict(zip(("r_norm", "k_norm"), norms, strict=True))
    by_name |= {name: total[place] for name, place in rows.items() if not name.endswith("_norm")}
    return [_as_gradient(by_name.get(name), x) for name, x in given.items()], None, None, None, None


def _as_gradient(found: Tensor | None, x: Tensor) -> Tensor | None:
    return None if found is None else found.view(x.shape).to(x.dtype)


_inputs.register_autograd(_differentiate_inputs, setup_context=_setup_inputs)


def _output_names(names, hand_key: bool) -> list[str]:
    """Return the outputs of `_inputs` for the inputs that are given."""
    absent = {"v": "value_gate" not in names, "bonus": "r_k" not in names, "key": not hand_key}
    return [name for name in OUTPUTS if not absent.get(name, False)]


@torch.library.custom_op("rwkvinside::mixer_output_triton", mutates_args=())
def _output(
    y: Tensor,
    low: Tensor,
    up: Tensor,
    bonus: Tensor | None,
    v: Tensor | None,
    near: Tensor | None,
    weight: Tensor | None,
    mix_recurrence: Tensor | None,
    mix_window: Tensor | None,
    scale: float,
) -> Tensor:
    mixed = _mixed(near, weight, mix_recurrence, mix_window)
    launches, out = plan_output(y, _product(low, up, y.shape[3]), bonus, v, scale, mixed)
    run(launches, y.device)
    return out


def _mixed(
    near: Tensor | None, weight: Tensor | None, mix_recurrence: Tensor | None, mix_window: Tensor | None
) -> Mixed | None:
    if near is None or mix_recurrence is None or mix_window is None:
        return None
    return Mixed(near, weight, mix_recurrence, mix_window)


@_output.register_fake
def _(y, low, up, bonus, v, near, weight, mix_recurrence, mix_window, scale):
    return low.new_empty(y.shape)


@torch.library.custom_op("rwkvinside::mixer_output_triton_backward", mutates_args=())
def _output_backward(
    y: Tensor,
    low: Tensor,
    up: Tensor,
    bonus: Tensor | None,
    v: Tensor | None,
    near: Tensor | None,
    weight: Tensor | None,
    mix_recurrence: Tensor | None,
    mix_window: Tensor | None,
    scale: float,
    dout: Tensor,
) -> list[Tensor]:
    mixed = _mixed(near, weight, mix_recurrence, mix_window)
    launches, grads = plan_output_backward(y, _product(low, up, y.shape[3]), bonus, v, scale, dout, mixed)
    run(launches, y.device)
    dlow, dup = _factor_gradients(grads.pop("gate"), low, up)
    if "sums" in grads:
        grads["sums"] = grads["sums"].sum(0)
    return [grads.pop("y"), dlow, dup, *grads.values()]


@_output_backward.register_fake
def _(y, low, up, bonus, v, near, weight, mix_recurrence, mix_window, scale, dout):
    grads = [x.new_empty(x.shape) for x in (y, low, up, bonus, v, near, weight) if x is not None]
    return grads if near is None else [*grads, y.new_empty(2, *y.shape[2:], dtype=torch.float32)]


def _setup_output(ctx, inputs, output) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_output(ctx, dout):
    tensors = ctx.saved_tensors
    found = iter(_output_backward(*tensors, ctx.scale, dout))
    grads: list[Tensor | None] = [None if x is None else next(found) for x in tensors[:7]]
    mixes = tensors[7:]
    sums = (None, None) if mixes[0] is None else next(found)
    return *grads, *(_as_gradient(x, mix) for x, mix in zip(sums, mixes, strict=True)), None


_output.register_autograd(_differentiate_output, setup_context=_setup_output)


def _check_inputs(given: dict[str, Tensor], key_scale: str) -> None:
    if key_scale not in KEY_SCALES:
        raise ValueError(f"key_scale is {key_scale!r}, allowed: {', '.join(KEY_SCALES)}")
    for whole in (
        {"r", "k", "v", "decay", "iclr", "w0", "a0"}, {"r_norm", "k_norm"}, {"cos", "sin"}, {"k_k", "k_a"},
        {"key_gate", "k_first", "k0"}, {"v_first", "v0"},
    ):  # fmt: skip
        if (missing := whole - given.keys()) and missing != whole:
            raise ValueError(f"{', '.join(sorted(whole))} belong together: {', '.join(sorted(missing))} missing")
    if (key_scale == "k_a") != ("k_a" in given):
        raise ValueError("key_scale k_a needs k_k and k_a, and the others do not read them")
    if "v_first" in given and "value_gate" not in given:
        raise ValueError("v_first is mixed in by a value_gate, which is missing")
    B, T, H, N = given["r"].shape
    G = given["k"].shape[2]
    layout = _Layout(given, key_scale)
    if N % 8 or not 8 <= N <= 256 or H % G:
        raise ValueError(f"{H} heads of {N} columns, {G} of keys: N must be a multiple of 8 up to 256, G divide H")
    values = layout.value_heads
    heads = dict(r=(H,), k=(G,), v=(G,), k_first=(G,), v_first=(G, values))
    for name, allowed in heads.items():
        if name in given and given[name].shape not in [(B, T, count, N) for count in allowed]:
            expected = " or ".join(str((B, T, count, N)) for count in allowed)
            raise ValueError(f"{name} has shape {tuple(given[name].shape)}, expected {expected}")
    for name, allowed in dict(decay=(H,), iclr=(H,), key_gate=(G,), value_gate=(G, H)).items():
        if name in given:
            low, up = given[name], given[f"{name}_up"]
            if low.shape != (B, T, up.shape[0]) or up.shape[1] not in [count * N for count in allowed]:
                shapes = f"{tuple(low.shape)} and {tuple(up.shape)}"
                widths = " or ".join(str(count * N) for count in allowed)
                raise ValueError(f"{name} has shapes {shapes}, expected {(B, T)} x rank and rank x {widths}")
    for name in ("cos", "sin"):
        if name in given and given[name].shape not in [(1, T, N), (B, T, N)]:
            raise ValueError(f"{name} has shape {tuple(given[name].shape)}, expected {(B, T, N)} or {(1, T, N)}")
    counts = dict(r_norm=1, k_norm=1, w0=H, a0=H, k0=G, v0=values, r_k=H, k_k=H, k_a=H)
    for name, count in counts.items():
        if name in given and given[name].numel() != count * N:
            raise ValueError(f"{name} has {given[name].numel()} values, expected {count * N}")
    for name, x in given.items():
        if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"{name} is {x.dtype}: the kernels take bfloat16, float16 and float32")
    if given["r"].device.type != "cuda" and not INTERPRETED.value:
        raise RuntimeError(f"the Triton kernels need a CUDA device, r is on {given['r'].device}")
