"""Configurations of hybrid models: a teacher family's own configuration plus which layers are RWKV and how they mix.

Everything the teacher's configuration says keeps its meaning. `layer_types`, where a family has it, goes on telling
transformers which masks and key/value slots to prepare; which layers are recurrent stands in `rwkv_layers` alone.
"""

from dataclasses import dataclass

from transformers import LlamaConfig, Qwen2Config, Qwen3Config


@dataclass(kw_only=True, repr=False)
class HybridFields:
    """The fields that every hybrid configuration adds to its family's.

    Attributes:
        rwkv_layers: indices of the layers whose attention is an RWKV-7 time mixer, ascending. The first of them is the
            source of v_first and k_first.
        mixer: `TimeMixerConfig.to_dict()`, the same for all of these layers.
        attention_rope: whether the layers that keep attention rotate their queries and keys (False: NoPE).
        rwkv_architecture: the preset the mixer was made from, for instance "cxa079".
        teacher_model: name or path of the model that was converted.
    """

    rwkv_layers: list | None = None
    mixer: dict | None = None
    attention_rope: bool = True
    rwkv_architecture: str | None = None
    teacher_model: str | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.rwkv_layers = [] if self.rwkv_layers is None else list(self.rwkv_layers)
        if any(not 0 <= i < self.num_hidden_layers for i in self.rwkv_layers):
            raise ValueError(f"rwkv_layers={self.rwkv_layers}: the model has layers 0 to {self.num_hidden_layers - 1}")
        if self.rwkv_layers != sorted(set(self.rwkv_layers)):
            raise ValueError(f"rwkv_layers={self.rwkv_layers} must be ascending, each layer once")
        if self.rwkv_layers and self.mixer is None:
            raise ValueError(f"rwkv_layers={self.rwkv_layers} needs the field mixer")


class HybridLlamaConfig(HybridFields, LlamaConfig):
    model_type = "hybrid_llama"


class HybridQwen2Config(HybridFields, Qwen2Config):
    model_type = "hybrid_qwen2"


class HybridQwen3Config(HybridFields, Qwen3Config):
    model_type = "hybrid_qwen3"
