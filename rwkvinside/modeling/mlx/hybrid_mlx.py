"""A language model whose layers mix time by softmax attention or by RWKV-7, for mlx-lm.

mlx-lm builds the model of the family and its caches; in the layers that `rwkv_layers` names, a `TimeMixer` stands where
the family's attention was. A mixer keeps its state in a cache of constant size that mlx-lm knows (`ArraysCache`), so
that chat, server, batches and prompt caches work as they do for its own recurrent models. Equations and names of
parameters are those of the model for transformers. This file travels with exported models, alone, since mlx-lm loads
one file: mlx and mlx-lm only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, KVCache

DECAY_SCALE = math.exp(-0.5)  # log_decay = -DECAY_SCALE * sigmoid(z) lies in (-0.6065, 0)
CHUNK = 32  # tokens whose updates are one matrix product; decays across half of them stay within e^10 in fp32
SEGMENT = 512  # tokens that are worked on at once, a multiple of CHUNK
GROUP_NORM_EPS = 64e-5
# parameters that stay fp32 whatever dtype the model is converted to: they shift a sigmoid, the decay or a score
FP32_PARAMETERS = ("w0", "a0", "v0", "k0", "far_bias", "far_growth")


class ModelArgs:
    """What config.json says.

    Attributes:
        config: all of it.
        module: of mlx-lm, with the family's model.
        family: the arguments of that model.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.module = import_module(f"mlx_lm.models.{config['mlx_module']}")
        self.family = self.module.ModelArgs.from_dict(config)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> ModelArgs:
        """Return the arguments of a config.json."""
        return cls(config)


def Model(args: ModelArgs) -> Hybrid:  # noqa: N802  # mlx-lm looks for a class of this name and calls it
    """Return the hybrid of the family that `args` names."""
    return type("Hybrid", (Hybrid, args.module.Model), {})(args)


class Hybrid(nn.Module):
    """Mixin over the model of a family in mlx-lm."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args.family)  # type: ignore[call-arg]  # the family's, which comes next
        self.config = SimpleNamespace(**args.config)
        recurrent, changes = self.config.rwkv_layers, self.config.mixer_layers
        kinds = [type(cache) for cache in self._family_cache()]
        self._masks_from = {}  # RWKV layer -> a layer that keeps attention of the kind that stood there
        for i, layer in enumerate(self.layers):
            number = self.config.rotation_of_layer[i]
            rotation = NoRotation() if number is None else Rotation(**self.config.rotations[number])
            if i not in recurrent:
                layer.self_attn.rope = rotation  # the trained model's: families here compute some kinds otherwise
                continue
            mixer = SimpleNamespace(**self.config.mixer | changes.get(str(i), {}))
            layer.self_attn = TimeMixer(mixer, i == min(recurrent), rotation)
            alike = (j for j, kind in enumerate(kinds) if kind is kinds[i] and j not in recurrent)
            self._masks_from[i] = next(alike, None)
        if self.config.mlx_module == "gemma2":
            for i in set(range(len(self.layers))) - set(recurrent):
                self.layers[i].self_attn.__class__ = _with_masks_of_batches(type(self.layers[i].self_attn))

    def __call__(
        self, inputs: mx.array, cache: list | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        """Return logits (B, T, V), as the family's model does.

        Raises:
            ValueError: layers are checkpointed, which cuts the gradient between RWKV layers.
        """
        if type(self.layers[0]).__call__.__name__ == "checkpointed_fn":
            raise ValueError("gradients of RWKV layers are wrong with checkpointed layers: leave out --grad-checkpoint")
        caches = cache or [None] * len(self.layers)
        first: list[mx.array] = []
        views = list(caches)
        for i, j in self._masks_from.items():
            views[i] = LayerView(caches[i], None if j is None else caches[j], first)
        if input_embeddings is None and self.config.embedding_factor != 1:
            input_embeddings = self.config.embedding_factor * self.model.embed_tokens(inputs)
        return super().__call__(inputs, views, *([] if input_embeddings is None else [input_embeddings]))

    def make_cache(self) -> list:
        """Return a cache for each layer: mlx-lm's own for attention, one of constant size for RWKV-7."""
        caches = self._family_cache()
        for i in self._masks_from:
            caches[i] = ArraysCache(self.layers[i].self_attn.slots)
        return caches

    def _family_cache(self) -> list:
        make = getattr(super(), "make_cache", None)
        return [KVCache() for _ in self.layers] if make is None else make()

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Return the weights under the names of the family's model, which knows experts one by one."""
        found: dict[str, mx.array] = {}
        for name, weight in weights.items():
            layer, experts, part = name.rpartition(".experts.")
            if experts and part == "gate_up_proj":
                gate, up = mx.split(weight, 2, axis=1)
                found |= {f"{layer}.switch_mlp.gate_proj.weight": gate, f"{layer}.switch_mlp.up_proj.weight": up}
            elif experts and part == "down_proj":
                found[f"{layer}.switch_mlp.down_proj.weight"] = weight
            else:
                found[name] = weight
        of_family = getattr(super(), "sanitize", None)
        return found if of_family is None else of_family(found)

    @property
    def cast_predicate(self) -> Callable[[str], bool]:
        """Return whether a parameter, by its name, may be converted to another dtype."""
        family = getattr(super(), "cast_predicate", lambda name: True)
        return lambda name: name.rpartition(".")[2] not in FP32_PARAMETERS and family(name)


def _with_masks_of_batches(attention: type) -> type:
    """Return an attention of Gemma 2 that takes the mask of a batch, which lacks the axis of grouped heads."""

    def call(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        grouped = isinstance(mask, mx.array) and mask.ndim == 4 and self.repeats > 1
        return attention.__call__(self, x, mask[:, :, None] if grouped else mask, cache)

    return type(attention.__name__, (attention,), {"__call__": call})


class Rotation(nn.Module):
    """Rotary embedding, the trained model's.

    Args:
        wavelengths: tokens for a radian, of each pair of dimensions that may turn.
        scales: what each of these pairs is multiplied by.
        interleaved: a pair are neighbors; otherwise they are half of all these dimensions apart.
    """

    def __init__(self, wavelengths: list[float], scales: list[float], interleaved: bool) -> None:
        super().__init__()
        self._wavelengths, self._interleaved = mx.array(wavelengths), interleaved
        factors = mx.repeat(mx.array(scales), 2) if interleaved else mx.array(scales * 2)
        self._factors = None if all(scale == 1 for scale in scales) else factors

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """Return x (B, heads, T, N), whose first token has the position `offset`."""
        turning = 2 * self._wavelengths.size
        if self._factors is not None:
            scaled = x[..., :turning] * self._factors.astype(x.dtype)
            x = mx.concatenate([scaled, x[..., turning:]], axis=-1)
        how: dict[str, Any] = {"traditional": self._interleaved, "base": None, "scale": 1.0}
        return mx.fast.rope(x, turning, **how, offset=offset, freqs=self._wavelengths)


class NoRotation(nn.Module):
    """Stands where an attention without positions would rotate."""

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """Return x."""
        return x


class LayerView:
    """What an RWKV layer is given as its cache, for one call of the model.

    Attributes:
        cache: its `ArraysCache`; None: the texts begin here and do not go on.
        attention: the cache of a layer that keeps attention; None: without one.
        first: value and key of the first RWKV layer, which it leaves here for the others.
    """

    def __init__(self, cache: ArraysCache | None, attention: Any, first: list[mx.array]) -> None:
        self.cache, self.attention, self.first = cache, attention, first

    def make_mask(self, *args: Any, **kwargs: Any) -> mx.array | str | None:
        """Return the mask of the layers that keep attention: the family's model asks its first layer for it."""
        return (self.attention or KVCache()).make_mask(*args, **kwargs)


class TimeMixer(nn.Module):
    """RWKV-7 time mixing in the place of a softmax attention; arrays are (B, heads, T, N) inside.

    Args:
        config: the fields of the mixer.
        is_first: this is the first RWKV layer, which has no residual mixes.
        rotation: of receptance and key.
    """

    def __init__(self, config: SimpleNamespace, is_first: bool, rotation: Rotation | NoRotation) -> None:
        super().__init__()
        self.config, self.is_first, self.rotation = config, is_first, rotation
        D, H, G, N = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_size
        C, KV = H * N, G * N
        self.receptance = nn.Linear(D, C, bias=config.qkv_bias)
        self.key = nn.Linear(D, KV, bias=config.qkv_bias)
        self.value = nn.Linear(D, KV, bias=config.qkv_bias)
        self.output = nn.Linear(C, D, bias=config.output_bias)
        if config.qk_norm:
            widths = (N, N) if config.norm_over == "head" else (C, KV)
            self.r_norm, self.k_norm = (nn.RMSNorm(width, eps=config.norm_eps) for width in widths)
        self._low_rank("w", config.rank_decay, C)
        self._low_rank("a", config.rank_iclr, C)
        self._low_rank("g", config.rank_gate, C, bias=False)
        if config.value_path == "additive":
            self._low_rank("v", config.rank_value, C, bias=False)
        elif config.value_path != "plain" and not is_first:
            self._low_rank("v", config.rank_value, KV if config.value_path == "residual_kv" else C)
        if config.key_residual and not is_first:
            self._low_rank("k", config.rank_key, KV)
        if config.bonus:
            self.r_k = mx.zeros((H, N))
        if config.key_scale == "k_a":
            self.k_k, self.k_a = mx.zeros((1, 1, C)), mx.zeros((1, 1, C))
        if config.token_shift:
            for name in "rwkvag":
                self[f"x_{name}"] = mx.zeros((1, 1, D))
        if config.group_norm:
            self.ln_x = nn.GroupNorm(H, C, eps=GROUP_NORM_EPS)  # for its parameters
        if config.window:
            self.mix_recurrence, self.mix_window = mx.zeros((H, N)), mx.zeros((H, N))
            if config.window_mix == "softmax":
                self.far_key, self.far_bias, self.far_growth = mx.zeros((H, N)), mx.zeros(H), mx.zeros(H)

    def _low_rank(self, name: str, rank: int, width: int, bias: bool = True) -> None:
        if bias:
            self[f"{name}0"] = mx.zeros((1, 1, width))
        self[f"{name}1"], self[f"{name}2"] = mx.zeros((self.config.hidden_size, rank)), mx.zeros((rank, width))

    @property
    def slots(self) -> int:
        """Return the number of arrays of its state: recurrence, tokens seen, last input, keys and values in reach."""
        return 2 + self.config.token_shift + 2 * (self.config.window > 0)

    def __call__(self, x: mx.array, *args: Any) -> mx.array:
        """Return the output (B, T, D) for x (B, T, D); the last argument is the layer's `LayerView`."""
        view, c, T = args[-1], self.config, x.shape[1]
        mask = None if view.cache is None else view.cache.make_mask(T)
        state = self._state(view.cache, x)
        seen = state[1]
        x_r, x_w, x_k, x_v, x_a, x_g = self._shifted(x, state, mask)
        r, k, v = self._projected(x_r, x_k, x_v, seen if mask is None else seen - mx.argmax(mask, axis=1))
        query, key, value = r, k, v
        if c.value_path == "residual_full":
            v = _to_heads(v, c.num_heads)
        if self.is_first:
            view.first[:] = (v, k)
        else:
            v_first, k_first = view.first
            if c.value_path.startswith("residual"):
                v = v + (v_first - v) * self._heads(self._sigmoid(x_v, "v")).astype(v.dtype)
            if c.key_residual:
                k = k + (k_first - k) * self._heads(self._sigmoid(x_k, "k")).astype(k.dtype)
        if c.value_path == "additive":
            v = _to_heads(v, c.num_heads) + 0.2 * self._heads((x_v @ self.v1) @ self.v2)
        z = self._heads(self.w0 + (mx.tanh(x_w @ self.w1) @ self.w2).astype(mx.float32))
        rate = self._heads(self._sigmoid(x_a, "a"))
        gate = self._heads(mx.sigmoid(x_g @ self.g1) @ self.g2)
        y, state[0] = self._recurrence(r, z, _to_heads(k, c.num_heads), _to_heads(v, c.num_heads), rate, mask, state[0])
        y = y * gate
        if c.window:
            y, state[-2:] = self._windowed(y, query, key, value, state, mask)
        if view.cache is not None:
            state[1] = seen + (T if mask is None else mask.sum(axis=1))
            for i, part in enumerate(state):
                view.cache[i] = part
            view.cache.advance(T)
        return self.output((c.output_scale * y).astype(x.dtype).swapaxes(1, 2).flatten(2))

    def _state(self, cache: ArraysCache | None, x: mx.array) -> list[mx.array]:
        """Return the arrays of the state; zeros where a text begins."""
        if cache is not None and not cache.empty():
            return [cache[i] for i in range(self.slots)]
        c, B = self.config, x.shape[0]
        H, G, N = c.num_heads, c.num_kv_heads, c.head_size
        state = [mx.zeros((B, H, N, N)), mx.zeros(B, mx.int32)]
        if c.token_shift:
            state.append(mx.zeros((B, 1, x.shape[2]), x.dtype))
        if c.window:
            state += [mx.zeros((B, G, c.sinks + c.window, N), x.dtype) for _ in range(2)]
        return state

    def _heads(self, x: mx.array) -> mx.array:
        """Return (B, T, heads * N) as (B, heads, T, N)."""
        return x.reshape(*x.shape[:2], -1, self.config.head_size).swapaxes(1, 2)

    def _sigmoid(self, x: mx.array, name: str) -> mx.array:
        low = (x @ self[f"{name}1"]) @ self[f"{name}2"]
        return mx.sigmoid(self[f"{name}0"] + low.astype(mx.float32))

    def _shifted(self, x: mx.array, state: list[mx.array], mask: mx.array | None) -> list[mx.array]:
        """Return the inputs of the maps r, w, k, v, a and g; the last real token of a row goes into the state."""
        if not self.config.token_shift:
            return [x] * 6
        if mask is not None:  # the first real token behind padding follows the state
            x = mx.where(mask[..., None], x, state[2])
        previous = mx.concatenate([state[2], x[:, :-1]], axis=1)
        state[2] = x[:, -1:] if mask is None else _ends(mx.concatenate([state[2], x], axis=1), mask, 1)
        return [x + (previous - x) * self[f"x_{name}"] for name in "rwkvag"]

    def _projected(
        self, x_r: mx.array, x_k: mx.array, x_v: mx.array, offset: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Return receptance, key and value, normed and rotated."""
        c = self.config
        r, k, v = self.receptance(x_r), self.key(x_k), self._heads(self.value(x_v))
        if c.qk_norm and c.norm_over == "heads":
            r, k = self.r_norm(r), self.k_norm(k)
        r, k = self._heads(r), self._heads(k)
        if c.qk_norm and c.norm_over == "head":
            r, k = self.r_norm(r), self.k_norm(k)
        return self.rotation(r, offset), self.rotation(k, offset), v

    def _recurrence(
        self,
        r: mx.array,
        z: mx.array,
        k: mx.array,
        v: mx.array,
        rate: mx.array,
        mask: mx.array | None,
        state: mx.array,
    ) -> tuple[mx.array, mx.array]:
        """Return the recurrence's output with scale or norm and bonus, fp32, and the state after it."""
        c = self.config
        r, k, v = (x.astype(mx.float32) for x in (r, k, v))
        log_decay = -DECAY_SCALE * mx.sigmoid(z)
        if c.key_scale == "k_a":
            k_k, k_a = (x.reshape(c.num_heads, 1, c.head_size).astype(mx.float32) for x in (self.k_k, self.k_a))
            kk = _normalized(k * k_k)
            k = k * (1 + (rate - 1) * k_a)
        else:
            kk = _normalized(k)
            s = mx.exp(log_decay) if c.key_scale == "decay" else -mx.logaddexp(0, -z) - 0.5
            k = k * (1 - s + rate)
        inputs = [r, log_decay, k, v, -kk, kk * rate]
        if mask is not None:  # padding leaves the state as it is
            inputs = [mx.where(mask[:, None, :, None], x, 0) for x in inputs]
        y, state = wkv7(inputs, state)
        if c.group_norm:
            weight, bias = (x.reshape(c.num_heads, 1, c.head_size) for x in (self.ln_x.weight, self.ln_x.bias))
            y = mx.fast.layer_norm(y, None, None, GROUP_NORM_EPS) * weight + bias
        else:
            y = y * c.head_size**-0.5
        if c.bonus:
            y = y + (r * k * self.r_k[:, None].astype(mx.float32)).sum(axis=-1, keepdims=True) * v
        return y, state

    def _windowed(
        self,
        y: mx.array,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        state: list[mx.array],
        mask: mx.array | None,
    ) -> tuple[mx.array, list[mx.array]]:
        """Return y with the window's share, and keys and values in reach after it.

        Args:
            y: gated recurrence (B, H, T, N).
            q, k, v: (B, H or G, T, N).
            state: of the layer, before.
            mask: (B, T), or None.
        """
        mixed, seen, held = [], state[1], state[-2:]
        for start in range(0, q.shape[2], SEGMENT):
            part = slice(start, start + SEGMENT)
            real = mx.ones((q.shape[0], k[:, :, part].shape[2]), mx.bool_) if mask is None else mask[:, part]
            of_part = [x[:, :, part] for x in (q, k, v)]
            (values, beyond), held = attend_to_window(of_part, real, seen, held, self.config, self._far())
            share = y[:, :, part] if beyond is None else y[:, :, part] * beyond
            mixed.append(self.mix_recurrence[:, None] * share + self.mix_window[:, None] * values)
            seen = seen + real.sum(axis=1)
        return mx.concatenate(mixed, axis=2), held

    def _far(self) -> list[mx.array] | None:
        names = ("far_key", "far_bias", "far_growth")
        return None if self.config.window_mix == "sum" else [self[name].astype(mx.float32) for name in names]


def _to_heads(x: mx.array, heads: int) -> mx.array:
    """Repeat (B, G, T, N) to (B, H, T, N): head h reads key/value head h // (H / G)."""
    return x if x.shape[1] == heads else mx.repeat(x, heads // x.shape[1], axis=1)


def _normalized(x: mx.array) -> mx.array:
    return x / mx.maximum(mx.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _ends(joined: mx.array, mask: mx.array, count: int) -> mx.array:
    """Return the `count` (B, count, ...) that end with the last real token of each row.

    Args:
        joined: (B, before + T, ...), in which the mask's tokens come last.
        mask: (B, T), real tokens of a row side by side.
        count: at most `before`.
    """
    last = mx.max(mx.where(mask, mx.arange(1, mask.shape[1] + 1), 0), axis=1, keepdims=True)
    index = joined.shape[1] - mask.shape[1] - count + last + mx.arange(count)
    return mx.take_along_axis(joined, index.reshape(*index.shape, *[1] * (joined.ndim - 2)), axis=1)


def attend_to_window(
    qkv: Sequence[mx.array],
    real: mx.array,
    seen: mx.array,
    held: Sequence[mx.array],
    form: SimpleNamespace,
    far: Sequence[mx.array] | None,
) -> tuple[tuple[mx.array, mx.array | None], list[mx.array]]:
    """Attend to the last `window` tokens of a text, the own one included, and to its first `sinks`.

    Args:
        qkv: queries (B, H, T, N), keys and values (B, G, T, N).
        real: (B, T), True where there is no padding; the real tokens of a row lie side by side.
        seen: (B,), real tokens before.
        held: keys and values (B, G, sinks + window, N) of the first tokens of the text, and of the last.
        form: with window, sinks, softcap.
        far: key (H, N), bias (H,) and growth (H,) of the score of all that lies beyond; None: without one.

    Returns:
        Weighed values and the weight of what lies beyond, or None, (B, H, T, N or 1) fp32; keys and values in reach
        after the last token.
    """
    q, k, v = qkv
    (B, H, T, N), G, (W, S) = q.shape, k.shape[1], (form.window, form.sinks)
    place = seen[:, None] + mx.cumsum(real.astype(mx.int32), axis=1) - 1  # of each token in its text
    slots, ring = mx.arange(S), seen[:, None] - W + mx.arange(W)
    places = mx.concatenate([mx.broadcast_to(slots, (B, S)), ring, place], axis=1)
    there = mx.concatenate([slots < seen[:, None], ring >= S, real], axis=1)
    keys, values = (mx.concatenate([past, x], axis=2) for past, x in zip(held, (k, v), strict=True))
    distance = place[:, :, None] - places[:, None]
    allowed = (distance >= 0) & ((distance < W) | (places < S)[:, None]) & there[:, None]
    q, keys32, values32 = (x.astype(mx.float32) for x in (q, keys, values))
    scores = q.reshape(B, G, H // G, T, N) @ keys32[:, :, None].swapaxes(-1, -2) * N**-0.5
    scores = scores if form.softcap is None else form.softcap * mx.tanh(scores / form.softcap)
    scores = mx.where(allowed[:, None, None], scores, -mx.inf).reshape(B, H, T, -1)
    if far is None:
        scores = mx.where(real[:, None, :, None], scores, 0)  # padding has nothing to attend to
        weights, beyond = mx.softmax(scores, axis=-1), None
    else:
        count = (place - W - S + 1)[:, None]
        score = (q * far[0][:, None]).sum(axis=-1) + far[1][:, None] + far[2][:, None] * mx.log(mx.maximum(count, 1))
        score = mx.where(count > 0, score, mx.where(real[:, None], -1000.0, 0))
        weights = mx.softmax(mx.concatenate([scores, score[..., None]], axis=-1), axis=-1)
        weights, beyond = weights[..., :-1], weights[..., -1:]
    out = (weights.reshape(B, G, H // G, T, -1) @ values32[:, :, None]).reshape(B, H, T, N)
    return (out, beyond), [_in_reach(x, S, W, real, seen) for x in (keys, values)]


def _in_reach(x: mx.array, S: int, W: int, real: mx.array, seen: mx.array) -> mx.array:
    """Return the first S and the last W of keys or values (B, G, S + W + T, N), of which the last T are new."""
    x = x.swapaxes(1, 2)
    last = _ends(x[:, S:], real, W)
    if S:
        index = mx.arange(S)
        begin = mx.argmax(real, axis=1)[:, None]
        at = S + W + mx.clip(begin + index - seen[:, None], 0, real.shape[1] - 1)
        new = (index >= seen[:, None]) & (index < (seen + real.sum(axis=1))[:, None])
        at = mx.where(new, at, index)
        last = mx.concatenate([mx.take_along_axis(x, at[..., None, None], axis=1), last], axis=1)
    return last.swapaxes(1, 2)


def wkv7(inputs: Sequence[mx.array], state: mx.array) -> tuple[mx.array, mx.array]:
    """Run S_t = S_{t-1} (diag(exp(log_decay_t)) + a_t b_t^T) + v_t k_t^T and y_t = S_t r_t.

    Args:
        inputs: r, log_decay, k, v, a and b, (B, H, T, N) fp32.
        state: S (B, H, N, N) fp32, as (value, key).

    Returns:
        y (B, H, T, N), and the state after the last token.
    """
    r, log_decay, k, v, a, b = inputs
    T = r.shape[2]
    if T == 1:
        removed = state @ a.swapaxes(-1, -2)
        state = state * mx.exp(log_decay) + removed * b + v.swapaxes(-1, -2) * k
        return (state @ r.swapaxes(-1, -2)).swapaxes(-1, -2), state
    more = -T % CHUNK
    padded = [mx.pad(x, [(0, 0), (0, 0), (0, more), (0, 0)]) for x in inputs]
    outputs = []
    for start in range(0, T + more, SEGMENT):
        y, state = _wkv7_chunks([x[:, :, start : start + SEGMENT] for x in padded], state)
        outputs.append(y)
    return mx.concatenate(outputs, axis=2)[:, :, :T], state


def _wkv7_chunks(inputs: Sequence[mx.array], state: mx.array) -> tuple[mx.array, mx.array]:
    """Return what `wkv7` does for a multiple of CHUNK tokens; docs/wkv7.md of the project has the derivation."""
    B, H, T, N = inputs[0].shape
    r, log_decay, k, v, a, b = (x.reshape(B, H, T // CHUNK, CHUNK, N) for x in inputs)
    total = mx.cumsum(log_decay, axis=3)
    middle, end = total[..., CHUNK // 2 - 1 : CHUNK // 2, :], total[..., -1:, :]
    # decays relative to the middle of the chunk: fp32 holds them on both sides
    r, a = r * mx.exp(total - middle), a * mx.exp(total - log_decay - middle)
    k, b = k * mx.exp(middle - total), b * mx.exp(middle - total)
    upto = mx.tril(mx.ones((CHUNK, CHUNK)))
    before = mx.tril(upto, -1)
    solved = _inverse((a @ b.swapaxes(-1, -2)) * before)
    a_solved = solved @ a
    v_solved = solved @ (((a @ k.swapaxes(-1, -2)) * before) @ v)
    r_b, r_k = (r @ b.swapaxes(-1, -2)) * upto, (r @ k.swapaxes(-1, -2)) * upto
    keep = (mx.eye(N) + a_solved.swapaxes(-1, -2) @ b) * mx.exp(end - middle) * mx.exp(middle).swapaxes(-1, -2)
    add = (v_solved.swapaxes(-1, -2) @ b + v.swapaxes(-1, -2) @ k) * mx.exp(end - middle)
    states = []
    for i in range(T // CHUNK):
        states.append(state)
        state = state @ keep[:, :, i] + add[:, :, i]
    begin = mx.stack(states, axis=2) * mx.exp(middle)
    y = (r + r_b @ a_solved) @ begin.swapaxes(-1, -2) + r_b @ v_solved + r_k @ v
    return y.reshape(B, H, T, N), state


def _inverse(lower: mx.array) -> mx.array:
    """Return (I - lower)^-1 of strictly lower triangular matrices (..., CHUNK, CHUNK), from blocks twice as large."""
    row, column = mx.arange(CHUNK)[:, None], mx.arange(CHUNK)
    solved, size = mx.broadcast_to(mx.eye(CHUNK), lower.shape), 1
    while size < CHUNK:
        beside = (row // size % 2 == 1) & (column // size == row // size - 1)
        solved = solved + solved @ mx.where(beside, lower, 0) @ solved
        size *= 2
    return solved
