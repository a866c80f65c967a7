"""Gemma 2: soft caps of scores and logits, local and global layers, norms as 1 + w around the blocks."""

from transformers import PretrainedConfig

from .base import Family, LogitShape


class Gemma2(Family):
    """Gemma 2."""

    model_type = "gemma2"
    hybrid = "hybrid_gemma2"
    scales = ("attn_logit_softcapping", "final_logit_softcapping")
    attention_post_norm_path = "post_attention_layernorm"
    mlp_norm_path = "pre_feedforward_layernorm"
    mlp_post_norm_path = "post_feedforward_layernorm"

    def attention_fields(self, config: PretrainedConfig, layer: int) -> dict:
        """Return the fields of `TimeMixerConfig` that the attention determines."""
        bias = config.attention_bias
        fields = self._attention_fields(config, qkv_bias=bias, output_bias=bias, qk_norm=False)
        return fields | {"softcap": config.attn_logit_softcapping}

    def score_scale(self, config: PretrainedConfig, layer: int) -> float:
        """Return what the products of queries and keys are multiplied with."""
        return config.query_pre_attn_scalar**-0.5

    def logit_shape(self, config: PretrainedConfig) -> LogitShape:
        """Return what the model makes of its head's output."""
        return LogitShape(cap=config.final_logit_softcapping)
