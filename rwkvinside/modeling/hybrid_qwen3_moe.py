"""Qwen3-MoE hybrids; see hybrid_base.py."""

from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Qwen3MoeModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention

from .hybrid_base import HybridBackbone, HybridCausalLM, HybridFields
from .kept_attention import KeptAttention


class HybridQwen3MoeConfig(HybridFields, Qwen3MoeConfig):
    """Configuration of a Qwen3-MoE hybrid."""

    model_type = "hybrid_qwen3_moe"


class KeptQwen3MoeAttention(KeptAttention, Qwen3MoeAttention):
    """Attention that a hybrid changes."""


class HybridQwen3MoeModel(HybridBackbone, Qwen3MoeModel):
    """Decoder without a head."""

    config: HybridQwen3MoeConfig
    kept_attention_class = KeptQwen3MoeAttention


class HybridQwen3MoeForCausalLM(HybridCausalLM, Qwen3MoeForCausalLM):
    """Causal language model."""

    config: HybridQwen3MoeConfig
    backbone_class = HybridQwen3MoeModel

    def __init__(self, config: HybridQwen3MoeConfig) -> None:
        super().__init__(config)
        self.router_aux_loss_coef = config.router_aux_loss_coef  # of a router loss, where it is asked for
        self.num_experts, self.num_experts_per_tok = config.num_experts, config.num_experts_per_tok
