"""Qwen3 (dense): an RMS norm of query and key in every head."""

from transformers import Qwen3Config

from .base import WEIGHT_MAP, Family


class Qwen3(Family):
    model_type = "qwen3"
    hybrid = "hybrid_qwen3"
    weight_map = WEIGHT_MAP | {"q_norm.weight": "r_norm.weight", "k_norm.weight": "k_norm.weight"}

    def attention_fields(self, config: Qwen3Config, layer: int) -> dict:
        bias = config.attention_bias
        return self._attention_fields(config, qkv_bias=bias, output_bias=bias, qk_norm=True)
