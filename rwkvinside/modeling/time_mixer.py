"""The RWKV-7 time mixer that replaces a softmax attention.

Its equations are those of docs/mixer.md; parameter names and shapes are those of existing cxa079 / hxa079
checkpoints and of RWKV-Infer. No state lives on the module. This file travels with exported models: torch only, no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .first_layer import FirstLayerKV
from .fused_mixer import is_fused_sequence, mix_fused, recomputed
from .mixer_init import init_mixer
from .mixer_presets import TimeMixerConfig
from .mixer_step import is_fused, mixer_step
from .window_attention import Attended, Beyond, Form, WindowState, window_attention
from .wkv7 import wkv7

DECAY_SCALE = math.exp(-0.5)  # log_decay = -DECAY_SCALE * sigmoid(z) lies in (-0.6065, 0)


class MixerState(NamedTuple):
    """What a mixer carries from token to token.

    Attributes:
        wkv: (B, H, N, N) fp32, as (value, key).
        shift: (B, D), the last input; None without token shift.
        window: keys and values of a window; None without one, and after packed documents.
    """

    wkv: Tensor
    shift: Tensor | None = None
    window: WindowState | None = None

    def tensors(self) -> list[Tensor]:
        """Return all tensors, in an order that depends on the mixer's configuration alone."""
        return [x for x in (self.wkv, self.shift, *(self.window or ())) if x is not None]

    def map(self, change: Callable[[Tensor], Tensor]) -> MixerState:
        """Return the state whose tensors are changed ones of this, which `change` sees in the order of `tensors`."""
        return MixerState(
            change(self.wkv),
            None if self.shift is None else change(self.shift),
            None if self.window is None else self.window.map(change),
        )


class RecurrenceInputs(NamedTuple):
    """The inputs of the recurrence and the gate of its output, (B, T, H, N) each.

    v and kk may have the G heads of keys and values, which head h reads as h // (H / G).
    """

    r: Tensor
    log_decay: Tensor
    k: Tensor
    v: Tensor
    kk: Tensor
    iclr: Tensor
    gate: Tensor


class ProjectedInputs(NamedTuple):
    """Projections of a layer's input.

    r and gate are (B, T, H, N), k and v (B, T, H or G, N), decay and iclr (B, T, H * N); the latter are added to w0
    and a0, and None with linear attention. key and value are k and v before their residual mixes, (B, T, G, N), which a
    window attends to with r as its query.
    """

    r: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    iclr: Tensor | None
    gate: Tensor
    key: Tensor
    value: Tensor


class TimeMixer(nn.Module):
    """RWKV-7 time mixing with the shapes of a softmax attention.

    Args:
        config: see `TimeMixerConfig`.
        is_first: this is the first RWKV layer of the model: it provides v_first and k_first and has no residual mixes.
        layer, num_layers, init, shift_ratio: where in which model it is, and how it begins, see `init_mixer`. On the
            meta device nothing is initialized.
    """

    w0: nn.Parameter  # decay: bias, and the matrices of its low-rank map
    w1: nn.Parameter
    w2: nn.Parameter
    a0: nn.Parameter  # in-context learning rate
    a1: nn.Parameter
    a2: nn.Parameter
    g1: nn.Parameter  # gate
    g2: nn.Parameter
    v0: nn.Parameter  # share of v_first
    v1: nn.Parameter
    v2: nn.Parameter
    k0: nn.Parameter  # share of k_first
    k1: nn.Parameter
    k2: nn.Parameter

    def __init__(
        self,
        config: TimeMixerConfig,
        is_first: bool,
        *,
        layer: int = 0,
        num_layers: int = 1,
        init: str = "calibrated",
        shift_ratio: float = 1.0,
    ):
        super().__init__()
        self.mixer_config = config
        self.is_first = is_first
        D, H, G, N = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_size
        C, KV = H * N, G * N

        self.receptance = nn.Linear(D, C, bias=config.qkv_bias)
        self.key = nn.Linear(D, KV, bias=config.qkv_bias)
        self.value = nn.Linear(D, KV, bias=config.qkv_bias)
        self.output = nn.Linear(C, D, bias=config.output_bias)
        if config.qk_norm:
            widths = (N, N) if config.norm_over == "head" else (C, KV)
            self.r_norm, self.k_norm = (nn.RMSNorm(width, eps=config.norm_eps) for width in widths)

        def low_rank(name: str, rank: int, width: int, bias: bool = True) -> None:
            if bias:
                self.register_parameter(f"{name}0", nn.Parameter(torch.empty(1, 1, width)))
            self.register_parameter(f"{name}1", nn.Parameter(torch.empty(D, rank)))
            self.register_parameter(f"{name}2", nn.Parameter(torch.empty(rank, width)))

        if not config.linear_attention:
            low_rank("w", config.rank_decay, C)
            low_rank("a", config.rank_iclr, C)
        low_rank("g", config.rank_gate, C, bias=False)
        if config.value_path == "additive":
            low_rank("v", config.rank_value, C, bias=False)
        elif config.value_path != "plain" and not is_first:
            low_rank("v", config.rank_value, KV if config.value_path == "residual_kv" else C)
        if config.key_residual and not is_first:
            low_rank("k", config.rank_key, KV)
        if config.bonus:
            self.r_k = nn.Parameter(torch.empty(H, N))
        if config.key_scale == "k_a" and not config.linear_attention:
            self.k_k = nn.Parameter(torch.empty(1, 1, C))
            self.k_a = nn.Parameter(torch.empty(1, 1, C))
        if config.token_shift:
            for name in self.mixed_inputs:
                self.register_parameter(f"x_{name}", nn.Parameter(torch.empty(1, 1, D)))
        if config.group_norm:
            self.ln_x = nn.GroupNorm(H, C, eps=64e-5)
        if config.window:
            self.mix_recurrence = nn.Parameter(torch.empty(H, N))  # weights of the gated recurrence and of the window
            self.mix_window = nn.Parameter(torch.empty(H, N))
            if config.window_mix == "softmax":  # the score of what lies beyond the window
                self.far_key = nn.Parameter(torch.empty(H, N))
                self.far_bias = nn.Parameter(torch.empty(H))
                self.far_growth = nn.Parameter(torch.empty(H))
        if not self.g1.is_meta:
            init_mixer(self, layer, num_layers, init, shift_ratio)

    @property
    def mixed_inputs(self) -> str:
        """The maps that read the layer's input, one letter each."""
        return "rkvg" if self.mixer_config.linear_attention else "rwkvag"

    def forward(
        self,
        x: Tensor,
        *,
        first: FirstLayerKV | None,
        state: MixerState | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inplace: bool = False,
        keep_state: bool = True,
        recompute: bool = False,
    ) -> tuple[Tensor, FirstLayerKV, MixerState]:
        """Mix a batch of rows.

        Args:
            x: (B, T, D), the output of the layer's input norm.
            first: v_first and k_first of the first RWKV layer; None exactly when this is that layer.
            state: what the previous tokens left, None at the start of a document; (S, ...) with cu_seqlens, but of a
                window (B, ...), on which the first document of a row goes on.
            rope: cos and sin, (B or 1, T, R), of the teacher's rotation, see `full_rotation`; None when the mixer does
                not rotate.
            mask: (B, T) bool, True = real token; padding leaves the state as it is.
            cu_seqlens: (S + 1,) document boundaries over the flattened B*T tokens (row ends included).
            inplace: the new state may take the memory of `state`.
            keep_state: whether somebody goes on from the new state; without, that of a window may be missing.
            recompute: a backward computes again what lies between the projections, which keep what they give.

        Returns:
            y (B, T, D), the FirstLayerKV to hand to later layers, and the state after the last token, (S, ...) with
            cu_seqlens; the window's is then (B, ...), of the last documents, and only where `state` has one.

        Raises:
            ValueError: a mixer that rotates was given no `rope`.
        """
        if self.mixer_config.rope and rope is None:
            raise ValueError("the mixer rotates its receptance and key: give rope=(cos, sin), or configure rope=False")
        rope = full_rotation(rope, self.mixer_config.head_size)
        if is_fused(self.mixer_config, x, cu_seqlens):
            y, first, parts = mixer_step(self, x, first=first, state=state, rope=rope, mask=mask, inplace=inplace)
            return self.projected(y.to(x.dtype)), first, MixerState(*parts)
        if is_fused_sequence(self.mixer_config, x):
            how: dict[str, Any] = {"inplace": inplace, "keep_state": keep_state, "recompute": recompute}
            y, first, parts = mix_fused(
                self, x, first=first, state=state, rope=rope, mask=mask, cu_seqlens=cu_seqlens, **how
            )
            return self.projected(y), first, MixerState(*parts)
        projected, first, shift = self.project_inputs(
            x, first=first, state=state, rope=rope, mask=mask, cu_seqlens=cu_seqlens
        )
        between = partial(self._between_projections, projected, x.dtype, state, mask, cu_seqlens, inplace, keep_state)
        y, wkv, window = recomputed(between) if recompute else between()
        return self.projected(y), first, MixerState(wkv, shift, window)

    def _between_projections(
        self,
        projected: ProjectedInputs,
        dtype: torch.dtype,
        state: MixerState | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        inplace: bool,
        keep_state: bool,
    ) -> tuple[Tensor, Tensor, WindowState | None]:
        """Return the input of the output projection (B, T, H * N), and the states of recurrence and window."""
        s = self.recurrence_inputs(projected)
        y, wkv = self.run_recurrence(s, None if state is None else state.wkv, mask, cu_seqlens, inplace)
        y, window = y * s.gate, None
        if self.mixer_config.window:
            before = None if state is None else state.window
            q, k, v = projected.r, projected.key, projected.value
            a, window = self.window_features(q, k, v, before, mask, cu_seqlens, inplace, keep_state)
            y = self.mixed(y, a)
        return y.flatten(2).to(dtype), wkv, window

    def project_inputs(
        self,
        x: Tensor,
        *,
        first: FirstLayerKV | None,
        state: MixerState | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[ProjectedInputs, FirstLayerKV, Tensor | None]:
        """Compute what does not depend on w0 and a0; arguments as of `forward`.

        Returns:
            The projections, the FirstLayerKV to hand to later layers, and the shift state.
        """
        c = self.mixer_config
        H, N = c.num_heads, c.head_size
        inputs, shift = self.shifted(x, None if state is None else state.shift, mask, cu_seqlens)
        xr, xk, xv, xg = (inputs[name] for name in "rkvg")

        r, k, v = self.project(xr, xk, xv, full_rotation(rope, N) if c.rope else None)
        key, value = k, v
        if c.value_path == "residual_full":
            v = _to_heads(v, H)
        if self.is_first:
            first = FirstLayerKV(v, k if c.key_residual else None)
        else:
            assert first is not None, "only the first RWKV layer runs without v_first"
            v_first, k_first = first.detach() if c.detach_first else first
            if c.value_path in ("residual_kv", "residual_full"):
                v_first = _to_heads(v_first, v.shape[2])  # a fused first layer hands on the heads of its projection
                v = v + (v_first - v) * self._low_rank_sigmoid(xv, "v").unflatten(-1, (-1, N)).to(v.dtype)
            if c.key_residual:
                assert k_first is not None, "the first RWKV layer has no key residual"
                k = k + (k_first - k) * self._low_rank_sigmoid(xk, "k").unflatten(-1, (-1, N)).to(k.dtype)
        if c.value_path == "additive":
            v = _to_heads(v, H) + 0.2 * ((xv @ self.v1) @ self.v2).unflatten(-1, (H, N))

        decay = iclr = None
        if not c.linear_attention:
            decay = torch.tanh(inputs["w"] @ self.w1) @ self.w2
            iclr = (inputs["a"] @ self.a1) @ self.a2
        gate = (torch.sigmoid(xg @ self.g1) @ self.g2).unflatten(-1, (H, N))
        return ProjectedInputs(r, k, v, decay, iclr, gate, key, value), first, shift

    def own_values(
        self,
        x: Tensor,
        *,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> FirstLayerKV:
        """Return the layer's own value and key: as `first` of its `forward` they make it the first RWKV layer.

        Arguments are those of `forward`, at the start of documents.
        """
        c = self.mixer_config
        inputs, _ = self.shifted(x, None, mask, cu_seqlens)
        rotation = full_rotation(rope, c.head_size) if c.rope else None
        _, k, v = self.project(inputs["r"], inputs["k"], inputs["v"], rotation)
        return FirstLayerKV(v, k if c.key_residual else None)

    def recurrence_inputs(self, projected: ProjectedInputs) -> RecurrenceInputs:
        """Return the inputs of the recurrence, from projections, w0 and a0."""
        c = self.mixer_config
        H, N = c.num_heads, c.head_size
        r, k, v, decay, iclr, gate, *_ = projected
        if decay is None or iclr is None:
            none = torch.zeros(r.shape, dtype=_fp32(r[:0]).dtype, device=r.device)
            return RecurrenceInputs(r, none, _to_heads(k, H), v, none, none, gate)
        # decay and in-context learning rate stay in fp32: near 0 a bf16 log decay is off by 2-3 %
        z = (_fp32(self.w0) + _fp32(decay)).unflatten(-1, (H, N))
        log_decay = -DECAY_SCALE * torch.sigmoid(z)
        iclr = torch.sigmoid(_fp32(self.a0) + _fp32(iclr)).unflatten(-1, (H, N))

        if c.key_scale == "k_a":
            k = _to_heads(k, H)
            kk = F.normalize(_fp32(k) * _fp32(self.k_k).view(H, N), dim=-1)
            k = k * (1 + (iclr - 1) * _fp32(self.k_a).view(H, N)).to(k.dtype)
        else:
            kk = F.normalize(_fp32(k), dim=-1)
            s = log_decay.exp() if c.key_scale == "decay" else F.logsigmoid(z) - 0.5
            k = times_shared((1 - s + iclr).to(k.dtype), k)
        return RecurrenceInputs(r, log_decay, k, v, kk, iclr, gate)

    def shifted(
        self, x: Tensor, last: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return the inputs (B, T, D) of the maps r, w, k, v, a and g, and the shift state.

        Without those of `mixed_inputs` that the mixer does not have. All are x itself without token shift, and the
        state is None. Arguments as of `forward`, `last` is the state that
        came before.
        """
        if not self.mixer_config.token_shift:
            return dict.fromkeys(self.mixed_inputs, x), None
        if mask is not None:
            x = x * mask[..., None].to(x.dtype)
        previous, shift = _shift(x, last, mask, cu_seqlens)
        return {name: x + (previous - x) * getattr(self, f"x_{name}") for name in self.mixed_inputs}, shift

    def project(
        self, xr: Tensor, xk: Tensor, xv: Tensor, rope: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return receptance (B, T, H, N), key and value (B, T, G, N), normed and rotated.

        With weights as they were copied these are the teacher's query, key and value; the dimensions of a head in the
        order of `full_rotation`, and the query times what takes r . k / sqrt(N) to the teacher's score.
        """
        c = self.mixer_config
        r, k = self.projected_rk(xr, xk)
        v = self.value(xv).unflatten(-1, (c.num_kv_heads, c.head_size))
        if c.qk_norm and c.norm_over == "head":
            r, k = self.r_norm(r), self.k_norm(k)
        if rope is not None:
            r, k = rotate(r, *rope), rotate(k, *rope)
        return r, k, v

    def projected_rk(self, xr: Tensor, xk: Tensor) -> tuple[Tensor, Tensor]:
        """Return receptance (..., H, N) and key (..., G, N) of inputs (..., D), with norms over all heads applied."""
        c = self.mixer_config
        r, k = self.receptance(xr), self.key(xk)
        if c.qk_norm and c.norm_over == "heads":
            r, k = self.r_norm(r), self.k_norm(k)
        return r.unflatten(-1, (c.num_heads, c.head_size)), k.unflatten(-1, (c.num_kv_heads, c.head_size))

    def run_recurrence(
        self,
        s: RecurrenceInputs,
        wkv: Tensor | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        inplace: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Run the recurrence, its scale or norm, and the bonus.

        Args:
            s: from `recurrence_inputs`.
            wkv: (B, H, N, N), or None for zeros.
            mask, cu_seqlens: as of `forward`.
            inplace: the final state may take the memory of `wkv`.

        Returns:
            y (B, T, H, N) before the gate, and the final state.
        """
        c = self.mixer_config
        inputs = (s.r, s.log_decay, s.k, s.v, -s.kk, times_shared(s.iclr, s.kk))
        y, wkv = self.recur(inputs, wkv, mask, cu_seqlens, inplace)
        y = self.ln_x(y.flatten(0, 1).flatten(1)).view_as(y) if c.group_norm else y * c.head_size**-0.5
        if c.bonus:
            y = y + times_shared((s.r * s.k * self.r_k.to(s.k.dtype)).sum(-1, keepdim=True), s.v)
        return y, wkv

    def recur(
        self,
        inputs: tuple[Tensor, ...],
        wkv: Tensor | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        inplace: bool,
    ) -> tuple[Tensor, Tensor]:
        """Run the recurrence alone on rows or packed documents.

        Args:
            inputs: r, log_decay, k, v, a and b of `wkv7`, (B, T, heads, N).
            wkv, mask, cu_seqlens, inplace: as of `run_recurrence`.

        Returns:
            y (B, T, H, N), and the final state.
        """
        B, T = inputs[0].shape[:2]

        def joined(x: Tensor) -> Tensor:
            return x if cu_seqlens is None else x.reshape(1, B * T, *x.shape[2:])

        r, log_decay, k, v, a, b = (joined(x) for x in inputs)
        y, wkv = wkv7(
            r,
            log_decay,
            k,
            v,
            a,
            b,
            wkv,
            mask=None if mask is None else joined(mask),
            cu_seqlens=cu_seqlens,
            backend=self.mixer_config.backend,
            precision=self.mixer_config.precision,
            inplace=inplace,
        )
        return y.view(B, T, *y.shape[2:]), wkv

    def window_features(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: WindowState | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inplace: bool = False,
        keep_state: bool = True,
    ) -> tuple[Attended, WindowState | None]:
        """Attend exactly to the tokens of the window and to the sinks.

        Args:
            q, k, v: r, key and value of `ProjectedInputs`.
            state: of the window, None at the start of a document.
            mask, cu_seqlens, inplace, keep_state: as of `forward`.

        Returns:
            What `mixed` adds to the recurrence, and the window's state; None with cu_seqlens.
        """
        c = self.mixer_config
        return window_attention(
            q,
            k,
            v,
            Form(c.window, c.sinks, c.softcap, self.beyond()),
            state=state,
            mask=mask,
            cu_seqlens=cu_seqlens,
            inplace=inplace,
            keep_state=keep_state,
            backend=c.backend,
        )

    def beyond(self) -> Beyond | None:
        """Return what scores the tokens beyond the window; None: the sum has no score."""
        return None if self.mixer_config.window_mix == "sum" else Beyond(self.far_key, self.far_bias, self.far_growth)

    def projected(self, y: Tensor) -> Tensor:
        """Return the layer's output (B, T, D) from what the heads give, (B, T, H * N)."""
        scale = self.mixer_config.output_scale
        return self.output(y if scale == 1 else scale * y)

    def mixed(self, y: Tensor, window: Attended) -> Tensor:
        """Return the weighed sum of gated recurrence (B, T, H, N) and window."""
        if window.beyond is not None:
            y = y * window.beyond.to(y.dtype)
        return self.mix_recurrence.to(y.dtype) * y + self.mix_window.to(window.values.dtype) * window.values

    def _low_rank_sigmoid(self, x: Tensor, name: str) -> Tensor:
        bias, down, up = (getattr(self, f"{name}{i}") for i in range(3))
        return torch.sigmoid(_fp32(bias) + _fp32((x @ down) @ up))


def _fp32(x: Tensor) -> Tensor:
    """Return `x` in fp32, or in fp64 if it is fp64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()  # the test costs less than an operation


def full_rotation(rope: tuple[Tensor, Tensor] | None, head_size: int) -> tuple[Tensor, Tensor] | None:
    """Return the rotation of whole heads that turns as many dimensions as the given one.

    Args:
        rope: cos and sin, (B or 1, T, R), in the half-split layout of transformers; None stays None.
        head_size: N >= R.

    Returns:
        cos and sin (B or 1, T, N): the first R / 2 dimensions of either half of a head turn, the others stay.
    """
    if rope is None or rope[0].shape[-1] == head_size:
        return rope
    still = (head_size - rope[0].shape[-1]) // 2
    cos, sin = (x.unflatten(-1, (2, -1)) for x in rope)
    return F.pad(cos, (0, still), value=1.0).flatten(-2), F.pad(sin, (0, still)).flatten(-2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the rotary embedding of x in the half-split layout of Llama and Qwen.

    Args:
        x: (B, T, heads, N).
        cos, sin: (B or 1, T, N).
    """
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos.unsqueeze(2) + turned * sin.unsqueeze(2)


def times_shared(x: Tensor, shared: Tensor) -> Tensor:
    """Return x (B, T, H, N or 1) times what heads share, (B, T, G, N).

    No copy of what they share is made for every head.
    """
    return (x.unflatten(2, (shared.shape[2], -1)) * shared.unsqueeze(3)).flatten(2, 3)


def _to_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat (B, T, G, N) to (B, T, H, N): head h reads key/value head h // (H / G)."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def _shift(x: Tensor, last: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return each position's previous real token (B, T, D) and each row's or document's last real token.

    Before the first of them comes `last`, (B, D), or (S, D) with cu_seqlens; None is 0.
    """
    if cu_seqlens is not None:
        return _shift_documents(x, last, mask, cu_seqlens)
    B, T, D = x.shape
    last = x.new_zeros(B, D) if last is None else last.to(x.dtype)
    history = torch.cat([last[:, None], x], 1)
    if mask is None:
        previous, newest = history[:, :-1], x[:, -1].clone()  # a state that keeps, and overwrites, nothing but itself
    else:
        # position (counted from 1) of the newest real token up to t; 0 is what came before this call
        newest_at = torch.where(mask, torch.arange(1, T + 1, device=x.device), 0).cummax(1).values
        before = F.pad(newest_at[:, :-1], (1, 0))
        previous = history.gather(1, before[..., None].expand(-1, -1, D))
        newest = history.gather(1, newest_at[:, -1:, None].expand(-1, -1, D))[:, 0]
    return previous, newest


def _shift_documents(x: Tensor, last: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `_shift` does for packed documents, some of which may be empty."""
    B, T, D = x.shape
    S = len(cu_seqlens) - 1
    last = x.new_zeros(S, D) if last is None else last.to(x.dtype)
    history = torch.cat([last, x.reshape(B * T, D)])  # what came before each document, then all tokens
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    at = torch.arange(B * T, device=x.device)
    documents = torch.searchsorted(ends, at, right=True)  # of each token
    # place in the history of the newest real token among the first n, for n from 0 on
    real = at + S if mask is None else torch.where(mask.flatten(), at + S, 0)
    newest = F.pad(real.cummax(0).values, (1, 0))

    def within(place: Tensor, document: Tensor) -> Tensor:
        return torch.where(place >= S + starts[document], place, document)

    previous = history[within(newest[:-1], documents)].view(B, T, D)
    return previous, history[within(newest[ends], torch.arange(S, device=x.device))]
