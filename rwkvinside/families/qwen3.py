"""Qwen3 (dense): an RMS norm of query and key in every head."""

from transformers import PretrainedConfig

from .base import QK_NORMS, WEIGHT_MAP, Family


class Qwen3(Family):
    """Qwen3."""

    model_type = "qwen3"
    hybrid = "hybrid_qwen3"
    llama_layers = True
    weight_map = WEIGHT_MAP | QK_NORMS

    def attention_fields(self, config: PretrainedConfig, layer: int) -> dict:
        """Return the fields of `TimeMixerConfig` that the attention determines."""
        bias = config.attention_bias
        return self._attention_fields(config, qkv_bias=bias, output_bias=bias, qk_norm=True)
