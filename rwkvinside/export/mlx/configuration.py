"""What the config.json of an export for mlx-lm says, and how its layers rotate."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ...families.registry import find
from ...hybrid.model import HybridModel
from ...modeling.time_mixer import full_rotation
from ..probe import fixed_batch, student_logits
from ..registry import MLX_FILE
from .limits import MODULES, SLIDE, period

STILL = 1e30  # tokens for a radian of dimensions that do not turn; infinity is nothing for a GPU's fast arithmetic
OF_TRANSFORMERS = ("architectures", "transformers_version", "auto_map", "_name_or_path", "rope_parameters")
ARCHITECTURE = "cxa079"  # a preset that rotates where the teacher does
OF_HYBRIDS = ("rwkv_layers", "mixer", "mixer_layers", "attention_rope", "rwkv_architecture", "teacher_model")


def configuration(teacher: PretrainedConfig, hybrid: PretrainedConfig, trained: HybridModel) -> dict[str, Any]:
    """Return the teacher's configuration in the terms that mlx-lm reads, and what the model file reads.

    Args:
        teacher: its configuration.
        hybrid: of the export for transformers.
        trained: the student.
    """
    module, family, count = MODULES[teacher.model_type], find(teacher.model_type), teacher.num_hidden_layers
    fields = {name: value for name, value in teacher.to_dict().items() if name not in OF_TRANSFORMERS}
    fields |= {alias: fields[name] for alias, name in teacher.attribute_map.items() if name in fields}
    fields["embedding_factor"] = 1.0
    if module == "gemma3_text":
        fields["sliding_window_pattern"] = period(teacher)
        exact = teacher.hidden_size**0.5  # what mlx-lm multiplies embeddings by, it rounds to bf16
        fields["embedding_factor"] = exact / torch.tensor(exact, dtype=torch.bfloat16).item()
    elif module in SLIDE:
        slides = [i not in hybrid.rwkv_layers and family.window(teacher, i) is not None for i in range(count)]
        fields["layer_types"] = ["sliding_attention" if slide else "full_attention" for slide in slides]
    dtype = name_of(hybrid.dtype)
    fields |= {"dtype": dtype, "torch_dtype": dtype}
    # what mlx-lm makes rotations from; the model file replaces them, so no kind has to be known to it
    given = getattr(teacher, "rope_parameters", None) or {}
    whole = given.get("full_attention", given)
    fields |= {"rope_theta": whole.get("rope_theta", 10000.0), "rope_scaling": None}
    fields["partial_rotary_factor"] = whole.get("partial_rotary_factor", 1.0)
    fields |= {name: getattr(hybrid, name) for name in ("tie_word_embeddings", *OF_HYBRIDS)}
    return fields | rotations(trained) | {"mlx_module": module, "model_file": MLX_FILE}


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype in configurations."""
    return str(dtype).removeprefix("torch.")


def rotations(model: HybridModel) -> dict[str, list]:
    """Return how each layer rotates: mixers, and attention that is kept.

    That is read off the rotation by one position that the layer is given.

    Returns:
        `rotations`, the arguments of the model file's `Rotation`, and `rotation_of_layer`, which of them, or None.
    """
    given: dict[int, tuple[Tensor, Tensor]] = {}
    config, family, mixers = model.lm.config, model.family, model.mixers

    def keep(layer: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        given[layer] = kwargs["position_embeddings"]

    def rotates(layer: int) -> bool:
        if layer in mixers:
            return mixers[layer].mixer_config.rope
        return model.spec.attention_rope and family.mixer_config(config, layer, ARCHITECTURE).rope

    hooks = [
        (mixers.get(i) or model.attention(i)).register_forward_pre_hook(partial(keep, i), with_kwargs=True)
        for i in range(config.num_hidden_layers)
        if rotates(i)
    ]
    student_logits(model, fixed_batch(config.vocab_size))
    for hook in hooks:
        hook.remove()
    found: list[dict] = []
    numbers: list[int | None] = [None] * config.num_hidden_layers
    for i, rope in given.items():
        mixer = mixers.get(i)
        rotation = _rotation_of(full_rotation(rope, mixer.mixer_config.head_size) if mixer else rope)
        rotation["interleaved"] = mixer is None and family.interleaved
        if rotation not in found:
            found.append(rotation)
        numbers[i] = found.index(rotation)
    return {"rotations": found, "rotation_of_layer": numbers}


def _rotation_of(rope: tuple[Tensor, Tensor] | None) -> dict[str, Any]:
    """Return wavelengths and scales of the cosines and sines (B, T, dimensions) that positions from 0 on have."""
    assert rope is not None
    cos, sin = (x[0, 1, : x.shape[-1] // 2].double() for x in rope)
    turns = sin.abs() > 0
    wavelengths = torch.where(turns, 1 / torch.atan2(sin, cos), STILL)
    scales = torch.where(turns, torch.hypot(cos, sin), 1.0)
    return {"wavelengths": wavelengths.float().tolist(), "scales": [round(x, 6) for x in scales.tolist()]}
