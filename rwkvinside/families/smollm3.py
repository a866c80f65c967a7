"""SmolLM3: every fourth layer has no rotation."""

from transformers import PretrainedConfig

from .base import Family


class SmolLM3(Family):
    """SmolLM3."""

    model_type = "smollm3"
    hybrid = "hybrid_smollm3"
    llama_layers = True

    def attention_fields(self, config: PretrainedConfig, layer: int) -> dict:
        """Return the fields of `TimeMixerConfig` that the attention determines."""
        bias = config.attention_bias
        fields = self._attention_fields(config, qkv_bias=bias, output_bias=bias, qk_norm=False)
        return fields if config.no_rope_layers[layer] else fields | {"rope": False}
