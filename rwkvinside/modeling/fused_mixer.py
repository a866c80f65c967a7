"""The time mixer where the recurrence runs in Triton: the work around it in two kernels, forward and backward.

The equations are those of `TimeMixer`'s own PyTorch code, which is the reference and what every other device runs. What
is different: the input is cast once, the low-rank maps go down in one product, everything between the products and the
recurrence is one launch (`rwkvinside.kernels.gpu.mixer`), and bonus, gate and the mix with a window are another. The
token shift and the group norm of stock RWKV-7 (x070) stay PyTorch code before and between them. This file travels with
exported models: torch only, no I/O.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .first_layer import FirstLayerKV
from .mixer_presets import TimeMixerConfig
from .window_attention import WindowState
from .wkv7 import kernels, why_unavailable

if TYPE_CHECKING:
    from .time_mixer import MixerState, TimeMixer


def is_fused_sequence(config: TimeMixerConfig, x: Tensor) -> bool:
    """Return whether a mixer of this configuration runs as `mix_fused` on inputs like x.

    It does where "auto" finds a GPU that the Triton kernels can use, and where the backend is "triton" by name (in
    Triton's interpreter, too); "chunked" and the others are PyTorch code throughout. A single token without gradient is
    not a sequence: `mixer_step` has a kernel of its own for it.
    """
    if x.shape[1] == 1 and not torch.is_grad_enabled() or not hasattr(kernels, "mixer_ops"):
        return False
    if config.linear_attention:  # an ablation has no kernel
        return False
    by_choice = config.backend == "triton" or config.backend == "auto" and x.device.type == "cuda"
    return by_choice and why_unavailable("triton", x.device.type, x.dtype, config.head_size) is None


def mix_fused(
    mixer: TimeMixer,
    x: Tensor,
    *,
    first: FirstLayerKV | None,
    state: MixerState | None,
    rope: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    inplace: bool,
    keep_state: bool,
    recompute: bool,
) -> tuple[Tensor, FirstLayerKV, tuple[Tensor, Tensor | None, WindowState | None]]:
    """Mix a batch of rows up to the output projection.

    Args:
        mixer: whose parameters and configuration count.
        x: (B, T, D).
        first, state, rope, mask, cu_seqlens, inplace, keep_state, recompute: as of `TimeMixer.forward`.

    Returns:
        The input of the output projection (B, T, H * N) in the dtype of products (that of autocast, else x's), the
        FirstLayerKV for later layers, and the parts of the new MixerState. The value that the first layer hands on has
        the G heads of its projection, whatever the value path.
    """
    last = None if state is None else state.shift
    inputs, shift = mixer.shifted(x.to(product_dtype(x)), last, mask, cu_seqlens)
    low_rank = _low_rank(mixer, inputs)
    value = mixer.value(inputs["v"]).unflatten(-1, (-1, mixer.mixer_config.head_size))
    projected = (*mixer.projected_rk(inputs["r"], inputs["k"]), value)
    between = partial(_between, mixer, projected, low_rank, first, rope, state, mask, cu_seqlens, inplace, keep_state)
    y, key, wkv, window = recomputed(between) if recompute else between()
    return y.flatten(2), FirstLayerKV(value, key) if first is None else first, (wkv, shift, window)


Result = TypeVar("Result")


def recomputed(between: Callable[[], Result]) -> Result:
    """Return what a function gives; a backward calls it again and keeps what it needs only while it runs.

    The function is the same at any time: nothing in a mixer is random.
    """
    return checkpoint(between, use_reentrant=False, preserve_rng_state=False)


Projected = tuple[Tensor, Tensor, Tensor]  # receptance, key, value
Factors = tuple[Tensor, Tensor]  # of the result of a low-rank map


def _between(
    mixer: TimeMixer,
    projected: Projected,
    low_rank: dict[str, Factors],
    first: FirstLayerKV | None,
    rope: tuple[Tensor, Tensor] | None,
    state: MixerState | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    inplace: bool,
    keep_state: bool,
) -> tuple[Tensor, Tensor | None, Tensor, WindowState | None]:
    """Return the input of the output projection, the key to hand on, and the states of recurrence and window."""
    c, ops = mixer.mixer_config, kernels.mixer_ops()
    s = _recurrence_tensors(mixer, projected, low_rank, first, rope)
    inputs, wkv = (s.r, s.log_decay, s.k, s.v, s.a, s.b), None if state is None else state.wkv
    y, wkv = mixer.recur(inputs, wkv, mask, cu_seqlens, inplace)
    if c.group_norm:
        y = mixer.ln_x(y.flatten(0, 1).flatten(1)).view_as(y)
    options: dict[str, Any] = {"scale": 1.0 if c.group_norm else c.head_size**-0.5}
    options |= {"bonus": s.bonus, "v": s.v if c.bonus else None}
    window = None if state is None else state.window
    if c.window:
        near, window = mixer.window_features(s.r, s.key, projected[2], window, mask, cu_seqlens, inplace, keep_state)
        options["mixed"] = ops.Mixed(*near, mixer.mix_recurrence, mixer.mix_window)
    return ops.output(y, low_rank["g"], **options), s.key if c.key_residual else None, wkv, window


def _recurrence_tensors(
    mixer: TimeMixer,
    projected: Projected,
    low_rank: dict[str, Factors],
    first: FirstLayerKV | None,
    rope: tuple[Tensor, Tensor] | None,
) -> Any:
    """Return the `RecurrenceTensors` of `kernels.mixer_ops`, of projected receptance, key and value."""
    c = mixer.mixer_config
    options: dict[str, Any] = {"value_gate": low_rank.get("v")}
    options |= {name: getattr(mixer, name, None) for name in ("r_k", "k_k", "k_a")}
    if c.rope:
        assert rope is not None, "a mixer that rotates needs cos and sin"
        options |= {"cos": rope[0], "sin": rope[1]}
    if c.qk_norm and c.norm_over == "head":
        options |= {"r_norm": mixer.r_norm.weight, "k_norm": mixer.k_norm.weight, "eps": c.norm_eps}
    if not mixer.is_first:
        assert first is not None, "only the first RWKV layer runs without v_first"
        v_first, k_first = first.detach() if c.detach_first else first
        if c.value_path.startswith("residual"):
            options |= {"v_first": v_first, "v0": mixer.v0}
        if c.key_residual:
            options |= {"key_gate": low_rank["k"], "k_first": k_first, "k0": mixer.k0}
    return kernels.mixer_ops().inputs(
        *projected,
        low_rank["w"],
        low_rank["a"],
        w0=mixer.w0,
        a0=mixer.a0,
        key_scale=c.key_scale,
        hand_key=bool(c.window) or mixer.is_first and c.key_residual,
        **options,
    )


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer multiplies x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _low_rank(mixer: TimeMixer, inputs: dict[str, Tensor]) -> dict[str, Factors]:
    """Return the two factors of the low-rank maps that the mixer has, by the letter of their parameters."""
    names = [name for name in "wgavk" if hasattr(mixer, f"{name}1")]
    downs = [getattr(mixer, f"{name}1") for name in names]
    if mixer.mixer_config.token_shift:
        parts = [inputs[name] @ down for name, down in zip(names, downs, strict=True)]
    else:  # all of one input: it is read once
        parts = list((inputs["r"] @ _SideBySide.apply(*downs)).split([down.shape[1] for down in downs], -1))
    low = dict(zip(names, parts, strict=True))
    low["w"], low["g"] = torch.tanh(low["w"]), torch.sigmoid(low["g"])
    # cast here, once: the op would cast them in its forward and twice in its backward, and their gradients back
    return {name: (part, getattr(mixer, f"{name}2").to(part.dtype)) for name, part in low.items()}


class _SideBySide(torch.autograd.Function):
    """Concatenation of matrices by columns, whose backward gives each its own memory in one operation.

    Parameters keep gradients of their own layout: slices would be copied one by one.
    """

    @staticmethod
    def forward(ctx: Any, *matrices: Tensor) -> Tensor:
        ctx.widths = [matrix.shape[1] for matrix in matrices]
        return torch.cat(matrices, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.ops.aten.split_with_sizes_copy(grad, ctx.widths, 1))
