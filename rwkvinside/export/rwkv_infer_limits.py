"""What RWKV-Infer does not compute, from configurations alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import PretrainedConfig

from ..families.registry import FAMILIES, find
from ..hybrid.layouts import LayerChoice, resolve_layout
from ..hybrid.settings import StudentConfig
from ..modeling.mixer_presets import PRESETS

ARCHITECTURE = "hxa079"
WIDTH = 256  # it pads the matrices of MLPs to multiples of this, but not what they read

# fields of `TimeMixerConfig` that a preset leaves open -> what is computed
MIXER = {"key_scale": "log", "key_residual": True, "window": 0, "output_scale": 1.0, "linear_attention": False}
KEPT = {"attention_rope": False, "attention_log_base": None, "attention_window": 0}  # of `StudentConfig`


def misfits(teacher: PretrainedConfig, student: StudentConfig) -> list[str]:
    """Return what RWKV-Infer would compute otherwise or not load, a line each with what works; [] where all fits.

    Args:
        teacher: its configuration.
        student: layers that are still to be chosen count as some that keep attention.
    """
    count = teacher.num_hidden_layers
    layout = resolve_layout(student.attention_layers, count, allow_all=True)
    kept = () if isinstance(layout, LayerChoice) else layout
    converted = [i for i in range(count) if i not in kept]
    lines = [*_of_teacher(teacher, kept), *_of_student(student, keeps=layout != ())]
    if not converted:
        lines.append("student.attention_layers names every layer; at least one RWKV layer works")
    if PRESETS[student.preset] is PRESETS[ARCHITECTURE] and find(teacher.model_type).llama_layers:
        lines += _of_mixers(teacher, student, converted)
    return lines


def _of_teacher(teacher: PretrainedConfig, kept: Sequence[int]) -> Iterator[str]:
    family, rope = find(teacher.model_type), getattr(teacher, "rope_parameters", None) or {}
    if not family.llama_layers:
        works = ", ".join(name for name in FAMILIES if find(name).llama_layers)
        yield f"the teacher's family is {teacher.model_type}; {works} work, with RMSNorm and SwiGLU as in Llama"
        return
    if (kind := rope.get("rope_type", "default")) != "default":
        yield f"the teacher's rotation is of type {kind}; default works"
    if (part := rope.get("partial_rotary_factor", 1.0)) != 1:
        yield f"the teacher rotates a part of each head, {part:g}; all of it works"
    if teacher.hidden_act not in ("silu", "swish"):
        yield f"the teacher's hidden_act is {teacher.hidden_act}; silu works"
    if getattr(teacher, "mlp_bias", False):
        yield "the teacher's MLPs have biases (mlp_bias); none work"
    if family.attention_fields(teacher, 0)["output_bias"]:
        yield "the teacher's attention has a bias on its output (attention_bias); biases of query, key and value work"
    if teacher.hidden_size % WIDTH:
        yield f"the teacher's hidden_size is {teacher.hidden_size}; multiples of {WIDTH} work"
    if slides := [i for i in kept if family.window(teacher, i) is not None]:
        tokens = family.window(teacher, slides[0])
        yield f"layer {slides[0]} keeps attention that slides over {tokens} tokens; full attention works"


def _of_student(student: StudentConfig, keeps: bool) -> Iterator[str]:
    if PRESETS[student.preset] is not PRESETS[ARCHITECTURE]:
        yield f"student.preset is {student.preset}; cxa079 and hxa079 work"
    for field, works in KEPT.items() if keeps else ():
        if (value := getattr(student, field)) != works:
            yield f"student.{field} is {_said(value)}; {_said(works)} works"


def _of_mixers(teacher: PretrainedConfig, student: StudentConfig, layers: Sequence[int]) -> Iterator[str]:
    family = find(teacher.model_type)
    mixers = {i: family.mixer_config(teacher, i, student.preset, **student.mixer_overrides(i)) for i in layers}
    for field, works in MIXER.items():
        if other := [value for mixer in mixers.values() if (value := getattr(mixer, field)) != works]:
            yield f"student.{field} is {_said(other[0])}; {_said(works)} works"
    if still := [i for i, mixer in mixers.items() if not mixer.rope]:
        yield f"layer {still[0]} of the teacher does not rotate; keep its attention (student.attention_layers)"


def _said(value: object) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value).lower()
