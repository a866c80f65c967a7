"""Which formats a configuration permits, before anything is trained."""

from __future__ import annotations

from transformers import PretrainedConfig

from ..families.registry import find
from ..hybrid.layouts import LayerChoice, resolve_layout
from ..hybrid.settings import StudentConfig
from . import rwkv_infer_limits
from .gguf.layout import unsupported
from .mlx.limits import misfits


def reasons_against(teacher: PretrainedConfig, student: StudentConfig) -> dict[str, list[str]]:
    """Return why each format of `registry.FORMATS` would refuse a student, [] where it would not.

    Args:
        teacher: its configuration.
        student: layers that are still to be chosen count as some that keep attention.
    """
    family, count = find(teacher.model_type), teacher.num_hidden_layers
    layout = resolve_layout(student.attention_layers, count, allow_all=True)
    kept = (0,) if isinstance(layout, LayerChoice) else layout
    converted = [i for i in range(count) if i not in kept]
    mixers = {i: family.mixer_config(teacher, i, student.preset, **student.mixer_overrides(i)) for i in converted}
    return {
        "hf": [],
        "mlx": misfits(teacher, student, mixers, kept),
        "gguf": unsupported(teacher, family, mixers),
        "rwkv-infer": rwkv_infer_limits.misfits(teacher, student),
    }


def exports_line(teacher: PretrainedConfig, student: StudentConfig) -> str:
    """Return a line for plans: the formats that a student can be exported to, and why not to the others."""
    reasons = reasons_against(teacher, student)
    refused = [
        f"{name} not: {found[0]}{f' (and {len(found) - 1} more)' if found[1:] else ''}"
        for name, found in reasons.items()
        if found
    ]
    return "\n          ".join(
        [f"exports   {', '.join(name for name, found in reasons.items() if not found)}", *refused]
    )
