"""What the config.json of an export for mlx-lm says, and how its mixers rotate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ...errors import UserError
from ...families.registry import find
from ...hybrid.model import HybridModel
from ...modeling.time_mixer import full_rotation
from ..probe import fixed_batch, student_logits
from ..registry import MLX_FILE
from .limits import MODULES, SLIDE, period

STILL = 1e30  # tokens for a radian of dimensions that do not turn; infinity is nothing for a GPU's fast arithmetic
OF_TRANSFORMERS = ("architectures", "transformers_version", "auto_map", "_name_or_path")
OF_HYBRIDS = ("rwkv_layers", "mixer", "mixer_layers", "attention_rope", "rwkv_architecture", "teacher_model")


def configuration(teacher: PretrainedConfig, hybrid: PretrainedConfig) -> dict[str, Any]:
    """Return the teacher's configuration in the terms that mlx-lm reads, and what the model file reads.

    Args:
        teacher: its configuration.
        hybrid: of the export for transformers.
    """
    module, family, count = MODULES[teacher.model_type], find(teacher.model_type), teacher.num_hidden_layers
    fields = {name: value for name, value in teacher.to_dict().items() if name not in OF_TRANSFORMERS}
    fields |= {alias: fields[name] for alias, name in teacher.attribute_map.items() if name in fields}
    fields["embedding_factor"] = 1.0
    if module == "gemma3_text":
        fields["sliding_window_pattern"] = period(teacher) or 1
        exact = teacher.hidden_size**0.5  # what mlx-lm multiplies embeddings by, it rounds to bf16
        fields["embedding_factor"] = exact / torch.tensor(exact, dtype=torch.bfloat16).item()
    elif module in SLIDE:
        slides = [i not in hybrid.rwkv_layers and family.window(teacher, i) is not None for i in range(count)]
        fields["layer_types"] = ["sliding_attention" if slide else "full_attention" for slide in slides]
    dtype = name_of(hybrid.dtype)
    fields |= dict(_rotation(teacher)) | {"dtype": dtype, "torch_dtype": dtype}
    fields |= {name: getattr(hybrid, name) for name in ("tie_word_embeddings", *OF_HYBRIDS)}
    return fields | {"mlx_module": module, "model_file": MLX_FILE}


def _rotation(teacher: PretrainedConfig) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a rotation as configurations had them before transformers 5."""
    given = getattr(teacher, "rope_parameters", None) or {}
    whole = given.get("full_attention", given)
    kind = whole.get("rope_type", "default")
    yield "rope_theta", whole.get("rope_theta", 10000.0)
    yield "partial_rotary_factor", whole.get("partial_rotary_factor", 1.0)
    yield "rope_scaling", None if kind == "default" else whole | {"type": kind}
    if "sliding_attention" in given:
        yield "rope_local_base_freq", given["sliding_attention"]["rope_theta"]


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype in configurations."""
    return str(dtype).removeprefix("torch.")


def rotations(model: HybridModel) -> tuple[dict[str, Tensor], float]:
    """Return the wavelengths of each mixer that rotates, by the name of the tensor, and what rotations multiply by.

    They are read off the rotation by one position that the mixer is given.

    Raises:
        UserError: layers rotate with different factors.
    """
    given: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(mixer: Any, args: Any, kwargs: dict) -> None:
        given[mixer.layer_idx] = kwargs["position_embeddings"]

    mixers = {i: mixer for i, mixer in model.mixers.items() if mixer.mixer_config.rope}
    handles = [mixer.register_forward_pre_hook(keep, with_kwargs=True) for mixer in mixers.values()]
    student_logits(model, fixed_batch(model.lm.config.vocab_size))
    for handle in handles:
        handle.remove()
    names = {id(parameter): name for name, parameter in model.canonical_parameters().items()}
    found, scales = {}, set()
    for i, mixer in mixers.items():
        half = mixer.mixer_config.head_size // 2
        rotation = full_rotation(given[i], 2 * half)
        assert rotation is not None
        cos, sin = (x[0, 1, :half].double() for x in rotation)
        turns = sin.abs() > 0
        scales.add(round(torch.hypot(cos, sin)[turns].mean().item(), 6))
        wavelengths = torch.where(turns, 1 / torch.atan2(sin, cos), STILL)
        found[f"{names[id(mixer.w0)].removesuffix('w0')}wavelengths"] = wavelengths.float()
    if len(scales) > 1:
        raise UserError("the teacher's layers rotate with different factors", "export --to hf")
    return found, next(iter(scales), 1.0)
