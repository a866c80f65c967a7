"""What the backward pass needs of a forward pass, in bytes for each token.

The counts follow from the student's structure, and from who runs the mixers: the native kernel of a CPU with PyTorch
code around it, or the fused Triton kernels of a GPU. `tests/planning/test_activations.py` compares both with what
autograd really keeps. The chunked path keeps other things; its counts are taken to be those of the native kernel.

Notation: D width, C = heads x head size, K = the same for keys and values, N head size, I inner size of the MLP; `low`
bytes of a product's type (2 under bf16, else 4), `stream` of the residual stream's. What is named fp32 has 4 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from .. import kernels
from ..families.base import Family
from ..families.fused_layers import is_gated, norm_form
from ..hybrid.model import HybridModel
from ..modeling.mixer_presets import TimeMixerConfig
from ..modeling.time_mixer import TimeMixer
from ..modeling.window_attention import LARGEST_IN_FP32, SCORE_CHANNELS, block_size

FP32, INT64 = 4, 8


def kept_bytes(
    model: HybridModel,
    *,
    align: bool,
    low: int,
    stream: int,
    fused: bool = False,
    fused_windows: bool = False,
    fused_layers: bool = False,
    recurrence: bool = True,
) -> list[int]:
    """Return the bytes that each layer keeps for one token.

    In the order of the layers; what trains is read from the model.

    Args:
        model: with its trainable parameters marked.
        align: only the mixers have a backward pass, each on its own.
        low, stream: see the notation.
        fused: the mixers run on the Triton kernels.
        fused_windows: kept attention that is cut to a window runs on theirs.
        fused_layers: norms and gated MLPs run on Liger's.
        recurrence: what lies between the projections of mixers is kept; False: it is computed again.
    """
    count = model.lm.config.num_hidden_layers
    mixers = {i: _mixer_bytes(m, low, stream, fused)[not recurrence] for i, m in model.mixers.items()}
    if align:
        # what the error's gradient needs, which is the difference in the output's type, or in fp32 from PyTorch code
        error = (low if fused else FP32) * model.lm.config.hidden_size
        return [mixers[i] + error if i in mixers else 0 for i in range(count)]
    first = _first_trained(model)
    more = fused_windows, fused_layers
    return [_layer(model, i, low, stream, mixers.get(i), *more) if i >= first else 0 for i in range(count)]


def edge_bytes(model: HybridModel, *, align: bool, checkpointing: bool, stream: int) -> tuple[int, int]:
    """Return the bytes a token that are kept whatever the layers keep.

    A layer that is recomputed keeps its input, in align also its target. The whole model keeps what the last norm
    needs, the hidden states that the head reads, their gradient, and the teacher's.

    Returns:
        For each layer, and for the whole model.
    """
    width = model.lm.config.hidden_size
    inputs = (2 if align else 1) * stream * width if checkpointing else 0
    return inputs, 0 if align else (2 * FP32 + 3 * stream) * width


def recomputed_bytes(model: HybridModel, *, low: int, stream: int, fused: bool) -> int:
    """Return the bytes a token of what lies between one mixer's projections, where its backward computes it again."""
    layers = (_mixer_bytes(mixer, low, stream, fused) for mixer in model.mixers.values())
    return max((whole - around for whole, around in layers), default=0)


def transient_bytes(model: HybridModel, *, align: bool, low: int) -> int:
    """Return the bytes a token of one layer's backward pass beyond what was kept.

    They are the gradients on their way through the recurrence (r, w, k, b and two more of C), or through the MLP (three
    of I).
    """
    inner = model.lm.config.intermediate_size
    mixer = FP32 * 6 * max((c.num_heads * c.head_size for c in model.mixer_configs.values()), default=0)
    return mixer if align else max(mixer, 3 * low * inner)


def _first_trained(model: HybridModel) -> int:
    """Return the index of the lowest layer through which a gradient has to go."""
    if any(p.requires_grad for p in model.family.embedding(model.lm).parameters()):
        return 0
    layers = model.family.layers(model.lm)
    trained = (i for i, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters()))
    return next(trained, len(layers))


def _layer(
    model: HybridModel, index: int, low: int, stream: int, mixer: int | None, fused_windows: bool, fused: bool
) -> int:
    family = model.family
    layer = family.layers(model.lm)[index]
    places = (family.attention_input, family.attention_post_norm, family.mlp_input, family.mlp_post_norm)
    norms = [norm for norm in (place(layer) for place in places) if not isinstance(norm, nn.Identity)]
    total = sum(_norm(norm, stream, fused) for norm in norms) + _mlp(family, layer, low, stream, fused)
    if mixer is not None:
        return total + mixer
    # attention: query, key and value for every head, the output, and norms of query and key over fp32
    attention = family.attention_linears(family.attention(layer))
    heads = family.attention_fields(model.lm.config, index)
    q, k = (heads[name] * heads["head_size"] for name in ("num_heads", "num_kv_heads"))
    total += _inputs(attention.inputs, low, stream)
    total += (output := _inputs([attention.output], low, low))
    window, sizes = model.kept_windows.get(index), (heads["num_heads"], heads["num_kv_heads"], heads["head_size"])
    if window is None:
        total += 4 * low * q
    elif fused_windows and _windows_in_triton(heads["head_size"], low):
        # what is attended is the output's input, which may be kept as that
        total += low * (q + 2 * k) + max(low * q - output, 0) + FP32 * heads["num_heads"] + INT64
    else:
        total += int(_attended(*sizes, *window, heads.get("softcap"), low))
    return total + (2 * FP32 * (q + k) if heads["qk_norm"] else 0)


def _mlp(family: Family, layer: nn.Module, low: int, stream: int, fused: bool) -> int:
    experts = family.experts(family.mlp(layer))
    if experts is not None:
        # for each chosen expert its input and output, gate, silu of it, up, and their product; weights of the choice
        count, width, inner = experts.output.shape
        return experts.chosen * low * (2 * width + 4 * inner) + FP32 * (2 * count + 4 * experts.chosen)
    mlp = family.mlp_linears(layer)
    between = 2 if fused and is_gated(family.mlp(layer)) else 3  # gate and up; where PyTorch computes, silu of the gate
    return _inputs(mlp.inputs, low, stream) + _inputs([mlp.output], low, low) + between * low * mlp.output.in_features


def _norm(norm: nn.Module, stream: int, fused: bool) -> int:
    """Return the bytes that a norm keeps.

    They are its input in fp32, and the normed value where the weight trains; of a fused one its input as it is.
    """
    width = norm.weight.numel()
    if fused and norm_form(type(norm)):
        return stream * width + FP32
    return FP32 * (width + 1) + (stream * width if norm.weight.requires_grad else 0)


def _inputs(linears: Sequence[nn.Module], low: int, input_bytes: int) -> int:
    """Return the bytes that linear layers keep of their common input.

    Nothing where they are frozen; the input once where it has their type already, else a copy for each. In addition
    what is between the two factors of their adapters.
    """
    trained = [linear for linear in linears if any(p.requires_grad for p in linear.parameters())]
    copies = len(trained) if input_bytes != low else min(len(trained), 1)
    ranks = sum(p.shape[0] for linear in trained for name, p in linear.named_parameters() if ".lora_A." in f".{name}")
    return low * (copies * linears[0].in_features + ranks)


def _mixer_bytes(mixer: TimeMixer, low: int, stream: int, fused: bool) -> tuple[int, int]:
    """Return what a mixer keeps, and what is left where it computes again what lies between its projections."""
    whole = _fused_mixer(mixer, low) if fused else _mixer(mixer, low, stream)
    return whole, _around_fused(mixer, low) if fused else _around(mixer, low, stream)


class _Sizes(NamedTuple):
    """Numbers of one token in a mixer.

    Attributes:
        C, K: of receptance, and of a key.
        values, keys: of value and key in the recurrence.
        v_residual, k_residual: it mixes the first layer's in.
    """

    C: int
    K: int
    values: int
    keys: int
    v_residual: bool
    k_residual: bool


def _sizes(mixer: TimeMixer) -> _Sizes:
    c, first = mixer.mixer_config, mixer.is_first
    C, K = c.num_heads * c.head_size, c.num_kv_heads * c.head_size
    return _Sizes(
        C=C,
        K=K,
        values=C if c.value_path in ("residual_full", "additive") else K,
        keys=C if c.key_scale == "k_a" else K,
        v_residual=c.value_path in ("residual_kv", "residual_full") and not first,
        k_residual=c.key_residual and not first,
    )


def _projections(mixer: TimeMixer, low: int, stream: int) -> int:
    """Return what the projections keep, their norms and residual mixes included."""
    c, D = mixer.mixer_config, mixer.mixer_config.hidden_size
    C, K, values, _, v_residual, k_residual = _sizes(mixer)
    ranks = c.rank_decay + c.rank_iclr + c.rank_gate
    ranks += c.rank_value * (v_residual or c.value_path == "additive") + c.rank_key * k_residual
    # x goes into receptance, key, value, decay, rate and gate, and into the residual mixes: it is kept once, or for
    # each of them where it has to be cast; with the token shift there are six of it, and what they were mixed from
    uses = 6 + v_residual + k_residual
    total = low * ranks + low * D * (6 if c.token_shift else 1 if stream == low else uses)
    total += stream * D * 6 * c.token_shift
    if c.qk_norm:
        total += FP32 * 2 * (C + K) + FP32 * (c.num_heads + c.num_kv_heads)
    total += v_residual * (FP32 + 2 * low if low != FP32 else 2 * FP32) * values
    return total + k_residual * (FP32 + _turned(c, low, stream)) * K


def _turned(c: TimeMixerConfig, low: int, stream: int) -> int:
    """Return the bytes of a number of receptance and key: they take the rotation's type, and the bonus theirs."""
    return stream if c.rope else low


def _around(mixer: TimeMixer, low: int, stream: int) -> int:
    """Return what is left of `_mixer` where all that lies between the projections is computed again."""
    c, (C, K, values, _, v_residual, k_residual) = mixer.mixer_config, _sizes(mixer)
    turned, mixed = _turned(c, low, stream), v_residual or c.value_path == "additive"
    # receptance, key, value, where these are mixed also what they were before; decay, rate, gate, and what comes out
    held = turned * (C + K + k_residual * K) + low * (values + mixed * K) + low * 4 * C
    return _projections(mixer, low, stream) + held


def _mixer(mixer: TimeMixer, low: int, stream: int) -> int:
    c, turned = mixer.mixer_config, _turned(mixer.mixer_config, low, stream)
    H, G, N = c.num_heads, c.num_kv_heads, c.head_size
    C, _, values, keys, *_ = _sizes(mixer)
    total = _projections(mixer, low, stream)
    # sigmoids of decay and rate; the decay itself, or two for its logarithm, or for the stock key; removed; the state
    # before every 16th token
    total += FP32 * C * (2 + (1 if c.key_scale == "decay" else 2) + 1 + N / 16)
    # of the recurrence: log decay and b in fp32, r, k and v, and a; before it the scale of the key, after it r k
    total += FP32 * 2 * C + turned * 2 * C + low * values + FP32 * keys
    total += turned * C * (1 + c.bonus) + FP32 * 2 * H
    # the key before and after it is scaled to length one
    total += FP32 * (2 * keys + 2 * G)
    total += (turned if c.bonus else low) * C + low * 2 * C  # y, the gate, and their product
    total += FP32 * (C + 2 * H) * c.group_norm
    return int(total + (_window(c, low, turned if c.bonus else low, turned) if c.window else 0))


def _around_fused(mixer: TimeMixer, low: int) -> int:
    """Return what `modeling.fused_mixer` keeps of projections, halves of low-rank maps, and the mixer's result."""
    c, D = mixer.mixer_config, mixer.mixer_config.hidden_size
    C, K, _, _, v_residual, k_residual = _sizes(mixer)
    v_low_rank = v_residual or c.value_path == "additive"
    ranks = c.rank_decay + c.rank_iclr + c.rank_gate + c.rank_value * v_low_rank + c.rank_key * k_residual
    # x in the products' type, or six mixtures of it and what they were mixed from; the low-rank maps, whose tanh and
    # sigmoid keep their results
    total = low * (ranks + c.rank_decay + c.rank_gate)
    total += low * D * (12 if c.token_shift else 1)
    total += low * (C + 2 * K)  # receptance, key, value
    total += low * K * (mixer.is_first and c.key_residual)  # handed to later layers
    return total + low * C  # the input of the output projection


def _fused_mixer(mixer: TimeMixer, low: int) -> int:
    """Return what `modeling.fused_mixer` keeps, the recurrence's own included."""
    c, first = mixer.mixer_config, mixer.is_first
    H, N = c.num_heads, c.head_size
    C, K, _, keys, v_residual, _ = _sizes(mixer)
    v_low_rank = v_residual or c.value_path == "additive"
    total = _around_fused(mixer, low)
    # of the recurrence: r, k, b, and the log decay; v where it is another one than the projection, and a
    values = 0 if not v_low_rank else K if c.value_path == "residual_kv" else C
    total += low * (3 * C + values + keys) + FP32 * C
    total += H * kernels.kept_beside_inputs(N, bf16=low != FP32)
    total += low * C + FP32 * H * c.bonus  # its output, and the bonus
    total += (low * C + FP32 * 2 * H) * c.group_norm
    if c.window and not _windows_in_triton(c.head_size, low):
        total += _window(c, low, low, low)
    elif c.window:
        # its key, where no other layer needs it; what is attended, sums of weights, where documents start, and with a
        # score the recurrence's weight
        scored = c.window_mix == "softmax"
        total += low * K * (not (first and c.key_residual)) + low * C + FP32 * H * (1 + scored) + INT64
    return int(total)


def _windows_in_triton(head_size: int, low: int) -> bool:
    return low != FP32 or head_size <= LARGEST_IN_FP32


def _window(c: TimeMixerConfig, low: int, gated: int, turned: int) -> float:
    """Return the bytes that a window keeps.

    The gated recurrence next to it has `gated` bytes a number, the query `turned`.
    """
    H, N, scored = c.num_heads, c.head_size, c.window_mix == "softmax"
    # beside what is attended: the result in the order of tokens, and the gated recurrence, which their weights are
    # multiplied with
    total = _attended(H, c.num_kv_heads, N, c.window, c.sinks, c.softcap, low, scored) + (low + gated) * H * N
    if not scored:
        return total
    # the result's weight of what lies beyond and its padding, the recurrence before it is weighed, the query in fp32
    return total + low * H * SCORE_CHANNELS + gated * H * N + FP32 * H * N * (turned != FP32)


def _attended(
    H: int, G: int, N: int, window: int, sinks: int, softcap: float | None, low: int, scored: bool = False
) -> float:
    """Return the bytes that attention in blocks of queries keeps; `scored`: with a score of what lies beyond."""
    size = block_size(window)
    seen = size + window + sinks + scored  # keys of a block of queries, which the mask has as numbers for each query
    copies = seen / size if sinks or scored else 1.0  # of keys and values; views where nothing is put next to them
    channels = N + SCORE_CHANNELS * scored
    # queries, the output, sums of weights
    plain = low * (2 * H * channels + 2 * copies * G * channels + H // G * seen) + FP32 * H
    if softcap is None:
        return plain
    # no kernel: the capped scores and the weights in fp32, these in the products' type too, and the mask
    return plain - low * H // G * seen + H * seen * (2 * FP32 + low * (low != FP32))
