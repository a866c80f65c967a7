"""Ministral: a sliding window in some layers."""

from transformers import PretrainedConfig

from .base import Family


class Ministral(Family):
    """Ministral."""

    model_type = "ministral"
    hybrid = "hybrid_ministral"
    llama_layers = True

    def attention_fields(self, config: PretrainedConfig, layer: int) -> dict:
        """Return the fields of `TimeMixerConfig` that the attention determines."""
        return self._attention_fields(config, qkv_bias=False, output_bias=False, qk_norm=False)
