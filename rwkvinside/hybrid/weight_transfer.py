"""Teacher attention -> mixer weights: which tensor becomes which, as a table."""

from __future__ import annotations

import torch
from torch import nn

from ..modeling.mixer_presets import TimeMixerConfig
from ..modeling.time_mixer import TimeMixer

# teacher attention -> mixer; the same for Llama, Qwen2 and Qwen3. Optional entries exist on both sides or on neither.
NAMES = {
    "q_proj.weight": "receptance.weight",
    "k_proj.weight": "key.weight",
    "v_proj.weight": "value.weight",
    "o_proj.weight": "output.weight",
    "q_proj.bias": "receptance.bias",
    "k_proj.bias": "key.bias",
    "v_proj.bias": "value.bias",
    "o_proj.bias": "output.bias",
    "q_norm.weight": "r_norm.weight",
    "k_norm.weight": "k_norm.weight",
}


def mixer_config(attention: nn.Module, teacher_config, preset: str, **overrides) -> TimeMixerConfig:
    """The configuration of the mixer that replaces `attention` of a teacher; overrides are its fields."""
    norm = getattr(attention, "q_norm", None)
    return TimeMixerConfig.from_preset(
        preset,
        qk_norm=norm is not None,
        norm_eps=teacher_config.rms_norm_eps if norm is None else norm.variance_epsilon,
        hidden_size=teacher_config.hidden_size,
        num_heads=teacher_config.num_attention_heads,
        num_kv_heads=teacher_config.num_key_value_heads,
        head_size=attention.head_dim,
        qkv_bias=attention.q_proj.bias is not None,
        output_bias=attention.o_proj.bias is not None,
        **overrides,
    )


@torch.no_grad()
def transfer(attention: nn.Module, mixer: TimeMixer) -> None:
    """Copy the teacher's projections and norms into the mixer, bit for bit.

    Raises:
        ValueError: a teacher tensor that has no place in the mixer (q/k norms and a preset without them, say), or a
            shape that does not fit.
    """
    targets = dict(mixer.named_parameters())
    for name, source in attention.named_parameters():
        target = targets.get(NAMES.get(name, ""))
        if target is None:
            raise ValueError(f"the teacher's attention has {name}, for which this mixer preset has no place")
        if target.shape != source.shape:
            raise ValueError(f"{name} has shape {tuple(source.shape)}, the mixer needs {tuple(target.shape)}")
        target.copy_(source)
