"""One token of a time mixer by the fused kernel of `rwkvinside.kernels`: products, one launch, the output's product.

A token shift before them and a window beside the recurrence are one launch more each.

`TimeMixer.forward` asks `is_fused` and calls `mixer_step`; everything else, and everything without that package, takes
the path that is written out there, which this one is tested against. This file travels with exported models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .first_layer import FirstLayerKV
from .mixer_presets import TimeMixerConfig
from .window_attention import WindowState, empty_state
from .wkv7 import kernels, why_unavailable

if TYPE_CHECKING:
    from .time_mixer import MixerState, TimeMixer

LARGEST_NORMED = 128  # head that the kernel takes with a group norm: a program has all of its state in registers


def is_fused(config: TimeMixerConfig, x: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Return whether one launch computes what lies between the projections of x (B, T, D) and the output's."""
    if x.shape[1] != 1 or cu_seqlens is not None or torch.is_grad_enabled():
        return False
    unknown = config.linear_attention or config.window and config.softcap
    unknown = unknown or config.group_norm and config.head_size > LARGEST_NORMED
    needed = ["mixer_step", "low_rank"] + ["window_step"] * bool(config.window)
    if config.token_shift or config.group_norm or config.key_scale == "k_a":
        needed.append("shift_step")  # with which the others took these up
    if unknown or not all(hasattr(kernels, name) for name in needed):
        return False
    chosen = config.backend == "triton" or config.backend == "auto" and x.is_cuda
    return chosen and why_unavailable("triton", x.device.type, x.dtype, config.head_size) is None


def mixer_step(
    mixer: TimeMixer,
    x: Tensor,
    *,
    first: FirstLayerKV | None,
    state: MixerState | None,
    rope: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    inplace: bool,
) -> tuple[Tensor, FirstLayerKV, tuple[Tensor, Tensor | None, WindowState | None]]:
    """Mix one token of each row; arguments as of `TimeMixer.forward`, x is (B, 1, D).

    Returns:
        The input (B, 1, H * N) of the output projection, the FirstLayerKV to hand on, and the parts of the new
        MixerState.
    """
    c, B = mixer.mixer_config, x.shape[0]
    H, G, N = c.num_heads, c.num_kv_heads, c.head_size
    mask = None if mask is None else mask[:, 0].contiguous()
    inputs, shift = _shifted(mixer, x[:, 0], None if state is None else state.shift, mask, inplace)
    r, k = mixer.projected_rk(inputs["r"], inputs["k"])
    v = mixer.value(inputs["v"]).view(B, G, N)
    maps = _low_rank_maps(mixer, inputs)
    given = _of_this_layer(mixer, None if not c.rope else rope) | _of_the_first(mixer, first)
    wkv, window = (None, None) if state is None else (state.wkv, state.window)
    # a window reads query and key as they are after norm and rotation
    k_out = torch.empty_like(k) if c.window or first is None and c.key_residual else None
    r_out = torch.empty_like(r) if c.window else None
    given |= {"k_out": k_out} | ({} if r_out is None else {"r_out": r_out})
    if first is None:
        shared = v.repeat_interleave(H // G, 1) if c.value_path == "residual_full" and G < H else v
        first = FirstLayerKV(shared[:, None], k_out[:, None] if c.key_residual and k_out is not None else None)
    if wkv is None:
        wkv = x.new_zeros(B, H, N, N, dtype=torch.float32)
    else:
        wkv = wkv.to(torch.float32, copy=not inplace).contiguous()
    y = kernels.mixer_step(
        r=r,
        k=k,
        v=v,
        decay=maps["w"],
        iclr=maps["a"],
        gate=maps["g"],
        v_mix=maps.get("v"),
        k_mix=maps.get("k"),
        state=wkv,
        mask=mask,
        norm_eps=c.norm_eps,
        log_scale=c.key_scale == "log",
        **given,
    )
    if r_out is not None and k_out is not None:
        y, window = _attend(mixer, r_out, k_out, v, y, window, mask, inplace)
    return y[:, None], first, (wkv, shift, window)


def _shifted(
    mixer: TimeMixer, x: Tensor, last: Tensor | None, mask: Tensor | None, inplace: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return what the mixer's maps read, by their letters, and the state of the token shift; x is (B, D), mask (B,)."""
    names = mixer.mixed_inputs
    if not mixer.mixer_config.token_shift:
        return dict.fromkeys(names, x), None
    last = torch.zeros_like(x) if last is None else last.to(x.dtype, copy=not inplace)
    last = last.contiguous()  # what is written to
    inputs = kernels.shift_step(x, last, [getattr(mixer, f"x_{name}") for name in names], mask)
    return dict(zip(names, inputs.unbind(), strict=True)), last


def _attend(
    mixer: TimeMixer,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    state: WindowState | None,
    mask: Tensor | None,
    inplace: bool,
) -> tuple[Tensor, WindowState]:
    """Return the sum of recurrence y (B, H * N) and window, and the window's state after the token.

    q is (B, H, N), k and v (B, G, N), mask (B,).
    """
    c = mixer.mixer_config
    if state is None:
        state = empty_state(v[:, None], c.window + c.sinks)
    elif not inplace:
        state = WindowState(*(x.clone() for x in state))
    held_k, held_v, seen = state
    weights = mixer.mix_recurrence, mixer.mix_window
    far = (mixer.far_key, mixer.far_bias, mixer.far_growth) if c.window_mix == "softmax" else ()
    y = kernels.window_step(q, k, v, y, held_k, held_v, seen, *weights, c.sinks, mask, *far)
    seen.add_(1 if mask is None else mask)
    return y, state


def _of_this_layer(mixer: TimeMixer, rope: tuple[Tensor, Tensor] | None) -> dict[str, Any]:
    """Return the kernel's arguments that are parameters, and the rotation."""
    given: dict[str, Any] = {"w0": mixer.w0, "a0": mixer.a0}
    if mixer.mixer_config.key_scale == "k_a":
        given |= {"k_k": mixer.k_k, "k_a": mixer.k_a}
    if mixer.mixer_config.group_norm:
        given |= {"ln_weight": mixer.ln_x.weight, "ln_bias": mixer.ln_x.bias, "ln_eps": mixer.ln_x.eps}
    if mixer.mixer_config.qk_norm and mixer.mixer_config.norm_over == "head":
        given |= {"r_weight": mixer.r_norm.weight, "k_weight": mixer.k_norm.weight}
    if mixer.mixer_config.bonus:
        given["r_k"] = mixer.r_k
    if rope is not None:
        given |= {"cos": rope[0][:, 0], "sin": rope[1][:, 0]}
    return given


def _of_the_first(mixer: TimeMixer, first: FirstLayerKV | None) -> dict[str, Tensor | None]:
    """Return the kernel's arguments for the residual mixes with the first RWKV layer."""
    given: dict[str, Tensor | None] = {}
    if first is not None and mixer.mixer_config.value_path.startswith("residual"):
        given |= {"v0": mixer.v0, "v_first": first.v[:, 0]}
    if first is not None and mixer.mixer_config.key_residual:
        assert first.k is not None, "the first RWKV layer has no key residual"
        given |= {"k0": mixer.k0, "k_first": first.k[:, 0]}
    return given


def _low_rank_maps(mixer: TimeMixer, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the outputs of the mixer's low-rank maps for inputs (B, D) by name, in as few launches as possible."""
    names = [name for name in "wagvk" if hasattr(mixer, f"{name}1")]
    downs, ups = ([getattr(mixer, f"{name}{i}") for name in names] for i in (1, 2))
    kinds = [{"w": "tanh", "g": "sigmoid"}.get(name, "none") for name in names]
    xs = [inputs[name] for name in names]
    # one for all where it is one: kernels of earlier versions take no other
    outputs = kernels.low_rank(xs if mixer.mixer_config.token_shift else xs[0], downs, ups, kinds)
    if outputs is None:
        hidden = [
            x @ down if kind == "none" else getattr(torch, kind)(x @ down)
            for x, down, kind in zip(xs, downs, kinds, strict=True)
        ]
        outputs = [h @ up for h, up in zip(hidden, ups, strict=True)]
    return dict(zip(names, outputs, strict=True))
