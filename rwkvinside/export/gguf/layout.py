"""What llama.cpp's architecture `arwkv7` can hold, and a student's tensors under its names.

It is RWKV-7 with RMS norms and the gated MLP of Llama. From the graph of llama.cpp (src/models/arwkv7.cpp): all layers
are recurrent, heads times head size is the width, there is no rotation, no norm of receptance and key, no bias. Its
output has no factor N^-0.5, which goes into the gate here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ...families.base import Family
from ...hybrid.model import HybridModel
from ...modeling.mixer_presets import TimeMixerConfig
from ...modeling.time_mixer import TimeMixer

ARCHITECTURE = "arwkv7"
NARROW, WIDE = HEAD_SIZES = 64, 128  # others are refused by CUDA, and wrong without a word on a CPU with AVX-512
WIDE_HEADS = (
    f"llama.cpp runs heads of {WIDE} on a CPU and with CUDA or SYCL; with Metal it ends, with Vulkan it computes them "
    "wrong (there: --device none)"
)
MIXED_INPUTS = "rwkvag"  # in the order of time_mix_lerp_fused
REQUIRED = {  # fields of a mixer's configuration, and what to set in their place
    "rope": (False, "mixers rotate"),
    "qk_norm": (False, "mixers have norms of receptance and key"),
    "qkv_bias": (False, "projections have biases"),
    "output_bias": (False, "output projections have biases"),
    "value_path": ("residual_full", "values have another residual"),
    "key_residual": (False, "keys have a residual"),
    "key_scale": ("k_a", "keys have another scale"),
    "linear_attention": (False, "mixers have no decay"),
    "window": (0, "mixers have windows"),
}


def unsupported(config: PretrainedConfig, family: Family, mixers: Mapping[int, TimeMixerConfig]) -> list[str]:
    """Return what of a student llama.cpp does not compute; [] if it computes all of it.

    Args:
        config: the teacher's.
        family: the teacher's.
        mixers: by layer; those that are missing keep attention.
    """
    reasons = []
    if kept := [i for i in range(config.num_hidden_layers) if i not in mixers]:
        reasons.append(f"layer {kept[0]} keeps attention")
    for name, (value, reason) in REQUIRED.items():
        if any(getattr(mixer, name) != value for mixer in mixers.values()):
            reasons.append(f"{reason} ({name})")
    heads = {(c.num_heads, c.head_size) for c in mixers.values()}
    if len(heads) > 1:
        reasons.append("heads differ between layers")
    for count, size in heads - {(config.hidden_size // size, size) for _, size in heads}:
        reasons.append(f"{count} heads of {size} are not the width {config.hidden_size}")
    if odd := {size for _, size in heads} - set(HEAD_SIZES):
        sizes = " and ".join(map(str, HEAD_SIZES))
        reasons.append(f"heads have {min(odd)} dimensions, and llama.cpp has kernels for {sizes} only")
    if len({(c.rank_decay, c.rank_iclr, c.rank_value, c.rank_gate) for c in mixers.values()}) > 1:
        reasons.append("ranks differ between layers")
    if not family.llama_layers:
        reasons.append(f"the teacher's layers ({config.model_type}) are not those of Llama")
    elif config.hidden_act != "silu" or getattr(config, "mlp_bias", False):
        reasons.append("the teacher's MLPs are not those of Llama")
    return reasons


class FileTensor(NamedTuple):
    """A tensor of the file.

    Attributes:
        name: llama.cpp's.
        read: returns it in fp32, as rows of what it is multiplied with.
        rounded: the parameter that it is, which has the dtype of the export there; None: it is fp32.
    """

    name: str
    read: Callable[[], Tensor]
    rounded: Tensor | None = None


def file_tensors(model: HybridModel) -> Iterator[FileTensor]:
    """Yield the tensors of a student for which `unsupported` has no reason.

    Args:
        model: without adapters and quantized layers.
    """
    family, lm = model.family, model.lm
    yield _matrix("token_embd", family.embedding(lm).weight)
    yield _vector("output_norm", family.final_norm(lm).weight)
    yield _matrix("output", family.head(lm).weight)  # llama.cpp wants it even where it is the embedding
    for i, layer in enumerate(family.layers(lm)):
        block, mlp = f"blk.{i}", family.mlp_linears(layer)
        yield _vector(f"{block}.attn_norm", family.attention_input(layer).weight)
        yield from _mixer_tensors(f"{block}.time_mix", model.mixers[i])
        yield _vector(f"{block}.ffn_norm", family.mlp_input(layer).weight)
        for name, linear in zip(("gate", "up", "down"), (*mlp.inputs, mlp.output), strict=True):
            yield _matrix(f"{block}.ffn_{name}", linear.weight)


def _mixer_tensors(prefix: str, mixer: TimeMixer) -> Iterator[FileTensor]:
    c = mixer.mixer_config
    C, repeats = c.num_heads * c.head_size, c.num_heads // c.num_kv_heads
    scale = 1.0 if c.group_norm else c.head_size**-0.5  # of the recurrence, not of the bonus

    def per_head(weight: Tensor) -> Tensor:
        return weight.unflatten(0, (c.num_kv_heads, c.head_size)).repeat_interleave(repeats, 0).flatten(0, 1)

    def lerp() -> Tensor:
        zeros = torch.zeros(c.hidden_size)
        return torch.stack([getattr(mixer, f"x_{n}").flatten() if c.token_shift else zeros for n in MIXED_INPUTS])

    yield _matrix(f"{prefix}_receptance", mixer.receptance.weight)
    yield _matrix(f"{prefix}_key", mixer.key.weight, per_head)
    yield _matrix(f"{prefix}_value", mixer.value.weight, per_head)
    yield _matrix(f"{prefix}_output", mixer.output.weight)
    for name in "wavg":
        if name == "v" and mixer.is_first:  # must be there, is not read, and has the rank of a
            yield _vector(f"{prefix}_v0", torch.zeros(C))
            yield _vector(f"{prefix}_v1", torch.zeros(c.rank_iclr, c.hidden_size))
            yield _vector(f"{prefix}_v2", torch.zeros(C, c.rank_iclr))
            continue
        if name != "g":
            yield _vector(f"{prefix}_{name}0", getattr(mixer, f"{name}0"), torch.flatten)
        factor = scale * c.output_scale if name == "g" else 1.0
        yield _vector(f"{prefix}_{name}1", getattr(mixer, f"{name}1"), torch.t)
        yield _vector(
            f"{prefix}_{name}2", getattr(mixer, f"{name}2"), lambda weight, factor=factor: weight.t() * factor
        )
    yield FileTensor(f"{prefix}_lerp_fused.weight", lambda: lerp()[:, None, None])
    yield _vector(f"{prefix}_k_k", mixer.k_k, torch.flatten)
    yield _vector(f"{prefix}_k_a", mixer.k_a, torch.flatten)
    bonus = mixer.r_k if c.bonus else torch.zeros(C)
    yield _vector(f"{prefix}_r_k", bonus, lambda weight: weight.flatten() / scale)
    if c.group_norm:
        yield _vector(f"{prefix}_ln", mixer.ln_x.weight)
        yield FileTensor(f"{prefix}_ln.bias", lambda: _fp32(mixer.ln_x.bias))


def _fp32(tensor: Tensor) -> Tensor:
    return tensor.detach().float()


def _matrix(name: str, tensor: Tensor, change: Callable[[Tensor], Tensor] = _fp32) -> FileTensor:
    return FileTensor(f"{name}.weight", lambda: change(_fp32(tensor)).contiguous(), tensor)


def _vector(name: str, tensor: Tensor, change: Callable[[Tensor], Tensor] = _fp32) -> FileTensor:
    return FileTensor(f"{name}.weight", lambda: change(_fp32(tensor)).contiguous())
