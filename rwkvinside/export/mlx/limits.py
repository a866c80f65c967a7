"""What mlx-lm and the model file do not compute, from configurations alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import PretrainedConfig

from ...families.base import Family
from ...families.registry import find
from ...hybrid.settings import StudentConfig
from ...modeling.mixer_presets import TimeMixerConfig

# model_type of a teacher -> module of mlx-lm with the model of its family
MODULES = {
    "llama": "llama",
    "mistral": "llama",
    "ministral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
    "smollm3": "smollm3",
    "granite": "granite",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3_text",
    "glm4": "glm4",
}
SLIDE = ("llama", "smollm3", "gemma3_text")  # modules whose attention slides where the configuration says so
UNTIED = ("glm4",)  # modules whose head is always a matrix of its own
GROWING = ("dynamic", "longrope")  # rotations that change with the length of the text


def misfits(
    teacher: PretrainedConfig, student: StudentConfig, mixers: dict[int, TimeMixerConfig], kept: Sequence[int]
) -> list[str]:
    """Return what would be computed otherwise, or not at all, with what works; [] where all fits.

    Args:
        teacher: its configuration.
        student: what is not about single layers.
        mixers: of all converted layers.
        kept: layers that keep attention.
    """
    family = find(teacher.model_type)
    if family.model_type not in MODULES:
        return [f"the teacher's family is {teacher.model_type}; {', '.join(MODULES)} work"]
    lines = []
    if not mixers:
        lines.append("student.attention_layers names every layer; at least one RWKV layer works")
    if any(mixer.linear_attention for mixer in mixers.values()):
        lines.append("student.linear_attention is true; false works")
    if grows := next((kind for kind in _rotations(teacher) if kind in GROWING), None):
        lines.append(f"the teacher's rotation is of type {grows}, which changes with the length of a text")
    return lines + list(_of_attention(teacher, student, family, kept))


def _of_attention(
    teacher: PretrainedConfig, student: StudentConfig, family: Family, kept: Sequence[int]
) -> Iterator[str]:
    for field in ("attention_window", "attention_log_base") if kept else ():
        if value := getattr(student, field):
            yield f"student.{field} is {value:g}; layers that keep attention are computed without it"
    module, longest = MODULES[family.model_type], teacher.max_position_embeddings
    slides = [i for i in kept if (family.window(teacher, i) or longest) < longest]
    if slides and module not in SLIDE:
        tokens = family.window(teacher, slides[0])
        yield f"layer {slides[0]} keeps attention that slides over {tokens} tokens, which mlx-lm's {module} does not"
    if kept and module == "gemma3_text" and period(teacher) is None:
        yield "the teacher's layers with full attention do not recur after a number of layers"


def _rotations(teacher: PretrainedConfig) -> list[str]:
    """Return the types of the rotations of a teacher."""
    given = getattr(teacher, "rope_parameters", None) or {}
    each = given.values() if all(isinstance(x, dict) for x in given.values()) else [given]
    return [rotation.get("rope_type", "default") for rotation in each]


def period(teacher: PretrainedConfig) -> int | None:
    """Return after how many layers one with full attention comes, None if it is not that regular."""
    kinds = list(teacher.layer_types)
    every = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
    regular = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(len(kinds))]
    return every if kinds == regular else None
