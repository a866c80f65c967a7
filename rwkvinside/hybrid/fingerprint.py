"""What tells a student from another one, for whoever reads its tensors."""

from __future__ import annotations

from ..modeling.hybrid_base import mixer_fields
from .model import HybridModel


def fingerprint(student: HybridModel) -> dict:
    """Return what tells students apart, as JSON values.

    Students with other values have tensors that do not fit, or would compute something else.
    """
    sizes = ("model_type", "num_hidden_layers", "vocab_size", "intermediate_size")
    values = {f"teacher.{name}": getattr(student.lm.config, name) for name in sizes}
    later = {"linear_attention": False, "output_scale": 1.0}  # checkpoints from before these existed lack them
    implementation = {"backend": "auto", "precision": "auto", "detach_first": False}  # the same student by another way
    mixers = mixer_fields({i: config.replace(**implementation) for i, config in student.mixer_configs.items()})
    values |= {name: value for name, value in (mixers["mixer"] or {}).items() if name not in implementation}
    values = {name: value for name, value in values.items() if name not in later or value != later[name]}
    values |= {"mixer_layers": mixers["mixer_layers"]} if mixers["mixer_layers"] else {}
    spec = student.spec
    values |= {"rwkv_layers": student.rwkv_layers, "attention_rope": spec.attention_rope}
    changes = {name: getattr(spec, name) for name in ("attention_log_base", "attention_window", "attention_sinks")}
    return values | {name: value for name, value in changes.items() if value}
