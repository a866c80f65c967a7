"""Llama, and what has its architecture: Llama 2 and 3, TinyLlama, SmolLM."""

from transformers import PretrainedConfig

from .base import Family


class Llama(Family):
    """Llama, and what has its architecture."""

    model_type = "llama"
    hybrid = "hybrid_llama"
    llama_layers = True

    def attention_fields(self, config: PretrainedConfig, layer: int) -> dict:
        """Return the fields of `TimeMixerConfig` that the attention determines."""
        bias = config.attention_bias
        return self._attention_fields(config, qkv_bias=bias, output_bias=bias, qk_norm=False)
