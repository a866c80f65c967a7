"""Qwen2 and Qwen2.5: biases on query, key and value."""

from transformers import Qwen2Config

from .base import Family


class Qwen2(Family):
    model_type = "qwen2"
    hybrid = "hybrid_qwen2"

    def attention_fields(self, config: Qwen2Config, layer: int) -> dict:
        return self._attention_fields(config, qkv_bias=True, output_bias=False, qk_norm=False)
