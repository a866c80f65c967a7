"""Qwen2 and Qwen2.5: biases on query, key and value."""

from transformers import PretrainedConfig

from .base import Family


class Qwen2(Family):
    """Qwen2 and Qwen2.5."""

    model_type = "qwen2"
    hybrid = "hybrid_qwen2"
    llama_layers = True

    def attention_fields(self, config: PretrainedConfig, layer: int) -> dict:
        """Return the fields of `TimeMixerConfig` that the attention determines."""
        return self._attention_fields(config, qkv_bias=True, output_bias=False, qk_norm=False)
