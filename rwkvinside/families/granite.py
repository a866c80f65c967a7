"""Granite (dense): multipliers of embedding, scores, blocks and logits."""

from transformers import PretrainedConfig

from .base import Family, LogitShape


class Granite(Family):
    """Granite."""

    model_type = "granite"
    hybrid = "hybrid_granite"
    scales = ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling")

    def attention_fields(self, config: PretrainedConfig, layer: int) -> dict:
        """Return the fields of `TimeMixerConfig` that the attention determines."""
        bias = config.attention_bias
        return self._attention_fields(config, qkv_bias=bias, output_bias=bias, qk_norm=False)

    def score_scale(self, config: PretrainedConfig, layer: int) -> float:
        """Return what the products of queries and keys are multiplied with."""
        return config.attention_multiplier

    def residual_scale(self, config: PretrainedConfig) -> float:
        """Return what the outputs of attention and MLP are multiplied with before they join the residual stream."""
        return config.residual_multiplier

    def logit_shape(self, config: PretrainedConfig) -> LogitShape:
        """Return what the model makes of its head's output."""
        return LogitShape(divisor=config.logits_scaling)
