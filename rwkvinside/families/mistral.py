"""Mistral: a sliding window in every layer, or in none."""

from transformers import PretrainedConfig

from .base import Family


class Mistral(Family):
    """Mistral."""

    model_type = "mistral"
    hybrid = "hybrid_mistral"
    llama_layers = True

    def attention_fields(self, config: PretrainedConfig, layer: int) -> dict:
        """Return the fields of `TimeMixerConfig` that the attention determines."""
        return self._attention_fields(config, qkv_bias=False, output_bias=False, qk_norm=False)
