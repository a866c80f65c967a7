"""GLM-4 (0414): neighbors of the first half of each head are rotated, norms around the blocks, gate and up in one."""

from transformers import PretrainedConfig

from .base import Family


class Glm4(Family):
    """GLM-4."""

    model_type = "glm4"
    hybrid = "hybrid_glm4"
    interleaved = True
    mlp_inputs = ("gate_up_proj",)
    attention_post_norm_path = "post_self_attn_layernorm"
    mlp_post_norm_path = "post_mlp_layernorm"

    def attention_fields(self, config: PretrainedConfig, layer: int) -> dict:
        """Return the fields of `TimeMixerConfig` that the attention determines."""
        return self._attention_fields(config, qkv_bias=config.attention_bias, output_bias=False, qk_norm=False)
