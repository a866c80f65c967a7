"""Ministral hybrids; see hybrid_base.py."""

from transformers import MinistralConfig, MinistralForCausalLM, MinistralModel
from transformers.models.ministral.modeling_ministral import MinistralAttention

from .hybrid_base import HybridBackbone, HybridCausalLM, HybridFields, UnrotatedAttention


class HybridMinistralConfig(HybridFields, MinistralConfig):
    """Configuration of a Ministral hybrid."""

    model_type = "hybrid_ministral"


class UnrotatedMinistralAttention(UnrotatedAttention, MinistralAttention):
    """Attention without positions."""


class HybridMinistralModel(HybridBackbone, MinistralModel):
    """Decoder without a head."""

    config: HybridMinistralConfig
    unrotated_attention_class = UnrotatedMinistralAttention


class HybridMinistralForCausalLM(HybridCausalLM, MinistralForCausalLM):
    """Causal language model."""

    config: HybridMinistralConfig
    backbone_class = HybridMinistralModel
