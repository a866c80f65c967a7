"""Qwen3 with experts: in all layers or in some."""

from torch import nn
from transformers import PretrainedConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from .base import QK_NORMS, WEIGHT_MAP, Experts, Family


class Qwen3Moe(Family):
    """Qwen3-MoE."""

    model_type = "qwen3_moe"
    hybrid = "hybrid_qwen3_moe"
    weight_map = WEIGHT_MAP | QK_NORMS

    def attention_fields(self, config: PretrainedConfig, layer: int) -> dict:
        """Return the fields of `TimeMixerConfig` that the attention determines."""
        bias = config.attention_bias
        return self._attention_fields(config, qkv_bias=bias, output_bias=bias, qk_norm=True)

    def experts(self, mlp: nn.Module) -> Experts | None:
        """Return the experts of an MLP; None: it is another module, or every token goes through all of it."""
        if not isinstance(mlp, Qwen3MoeSparseMoeBlock):
            return None
        return Experts(mlp.experts.gate_up_proj, mlp.experts.down_proj, mlp.gate.weight, mlp.gate.top_k)
