"""Gemma 3 without images: local and global layers, each with its own rotation, norms as 1 + w around the blocks."""

from transformers import PretrainedConfig

from .base import QK_NORMS, WEIGHT_MAP, Family, LogitShape


class Gemma3Text(Family):
    """Gemma 3, the model of texts alone."""

    model_type = "gemma3_text"
    hybrid = "hybrid_gemma3_text"
    scales = ("attn_logit_softcapping", "final_logit_softcapping")
    weight_map = WEIGHT_MAP | QK_NORMS
    norm_plus = 1.0
    attention_post_norm_path = "post_attention_layernorm"
    mlp_norm_path = "pre_feedforward_layernorm"
    mlp_post_norm_path = "post_feedforward_layernorm"

    def attention_fields(self, config: PretrainedConfig, layer: int) -> dict:
        """Return the fields of `TimeMixerConfig` that the attention determines."""
        bias = config.attention_bias
        return self._attention_fields(config, qkv_bias=bias, output_bias=bias, qk_norm=True)

    def score_scale(self, config: PretrainedConfig, layer: int) -> float:
        """Return what the products of queries and keys are multiplied with."""
        return config.query_pre_attn_scalar**-0.5

    def logit_shape(self, config: PretrainedConfig) -> LogitShape:
        """Return what the model makes of its head's output."""
        return LogitShape(cap=config.final_logit_softcapping)
