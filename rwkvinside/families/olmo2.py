"""OLMo 2: norms after the blocks, and of query and key over all heads together."""

from transformers import PretrainedConfig

from .base import QK_NORMS, WEIGHT_MAP, Family


class Olmo2(Family):
    """OLMo 2."""

    model_type = "olmo2"
    hybrid = "hybrid_olmo2"
    weight_map = WEIGHT_MAP | QK_NORMS
    attention_norm_path = None
    mlp_norm_path = None
    attention_post_norm_path = "post_attention_layernorm"
    mlp_post_norm_path = "post_feedforward_layernorm"

    def attention_fields(self, config: PretrainedConfig, layer: int) -> dict:
        """Return the fields of `TimeMixerConfig` that the attention determines."""
        bias = config.attention_bias
        fields = self._attention_fields(config, qkv_bias=bias, output_bias=bias, qk_norm=True)
        return fields | {"norm_over": "heads"}
