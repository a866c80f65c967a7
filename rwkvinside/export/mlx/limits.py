"""What mlx-lm and the model file do not compute, from configurations alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import PretrainedConfig

from ...families.base import Family
from ...families.registry import find
from ...hybrid.settings import StudentConfig
from ...modeling.kept_attention import is_cut
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
TIED = ("gemma2",)  # whose head is always the embedding
UNTIED = ("glm4",)  # whose head is always a matrix of its own
NO_BIASES = ("qwen3", "qwen3_moe", "gemma2", "gemma3_text")  # whose attention has none
HEADS_AS_WIDE = ("granite", "qwen2", "phi3")  # whose heads together are as wide as the model
TANH = ("gemma2", "gemma3_text")  # whose MLPs have the tanh form of GELU; the others have SiLU
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
    lines = [*_of_teacher(teacher, MODULES[family.model_type])]
    if not mixers:
        lines.append("student.attention_layers names every layer; at least one RWKV layer works")
    if any(mixer.linear_attention for mixer in mixers.values()):
        lines.append("student.linear_attention is true; false works")
    rotate = any(mixer.rope for mixer in mixers.values()) or (kept and student.attention_rope)
    if rotate and (grows := next((kind for kind in _rotations(teacher) if kind in GROWING), None)):
        lines.append(f"the teacher's rotation is of type {grows}, which changes with the length of a text")
    return lines + list(_of_attention(teacher, student, family, kept))


def _of_teacher(teacher: PretrainedConfig, module: str) -> Iterator[str]:
    works = "gelu_pytorch_tanh" if module in TANH else "silu"
    used = getattr(teacher, "hidden_activation", None) or teacher.hidden_act
    if used not in ((works, "swish") if works == "silu" else (works,)):
        yield f"the teacher's MLPs have {used}; {works} works"
    caps = [teacher.attn_logit_softcapping, teacher.final_logit_softcapping] if module in TANH else []
    if module == "gemma2" and None in caps:
        yield "the teacher lacks a soft cap (attn_logit_softcapping, final_logit_softcapping); with both it works"
    if module == "gemma3_text" and any(caps):
        yield "the teacher has soft caps (attn_logit_softcapping, final_logit_softcapping); without them it works"
    if module == "gemma3_text" and period(teacher) is None:
        yield "the teacher's layers with full attention do not recur after a number of layers"


def _of_attention(
    teacher: PretrainedConfig, student: StudentConfig, family: Family, kept: Sequence[int]
) -> Iterator[str]:
    module, longest = MODULES[family.model_type], teacher.max_position_embeddings
    if any(is_cut(teacher, i, student.attention_window) for i in kept):
        yield f"student.attention_window is {student.attention_window}; layers that keep attention are not cut"
    if kept and student.attention_log_base:
        yield f"student.attention_log_base is {student.attention_log_base:g}; scores do not grow"
    if (slides := [i for i in kept if (family.window(teacher, i) or longest) < longest]) and module not in SLIDE:
        tokens = family.window(teacher, slides[0])
        yield f"layer {slides[0]} keeps attention that slides over {tokens} tokens, which mlx-lm's {module} does not"
    if kept and module in NO_BIASES and getattr(teacher, "attention_bias", False):
        yield f"layers that keep attention have biases (attention_bias), which mlx-lm's {module} has not"
    if kept and module in HEADS_AS_WIDE:
        fields = family.attention_fields(teacher, kept[0])
        if (width := fields["num_heads"] * fields["head_size"]) != teacher.hidden_size:
            yield f"layers that keep attention have heads of {width} together; mlx-lm's {module} has hidden_size"


def _rotations(teacher: PretrainedConfig) -> list[str]:
    """Return the types of the rotations of a teacher."""
    given = getattr(teacher, "rope_parameters", None) or {}
    each = given.values() if all(isinstance(x, dict) for x in given.values()) else [given]
    return [rotation.get("rope_type", "default") for rotation in each]


def period(teacher: PretrainedConfig) -> int | None:
    """Return after how many layers one with full attention comes, None if it is not that regular."""
    kinds = list(teacher.layer_types)
    if "full_attention" not in kinds:
        return None
    every = kinds.index("full_attention") + 1
    regular = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(len(kinds))]
    return every if kinds == regular else None
