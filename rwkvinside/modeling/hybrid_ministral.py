"""Ministral hybrids; see hybrid_base.py."""

from transformers import MinistralConfig, MinistralForCausalLM, MinistralModel
from transformers.models.ministral.modeling_ministral import MinistralAttention

from .hybrid_base import HybridBackbone, HybridCausalLM, HybridFields
from .kept_attention import KeptAttention


class HybridMinistralConfig(HybridFields, MinistralConfig):
    """Configuration of a Ministral hybrid."""

    model_type = "hybrid_ministral"


class KeptMinistralAttention(KeptAttention, MinistralAttention):
    """Attention that a hybrid changes."""


class HybridMinistralModel(HybridBackbone, MinistralModel):
    """Decoder without a head."""

    config: HybridMinistralConfig
    kept_attention_class = KeptMinistralAttention


class HybridMinistralForCausalLM(HybridCausalLM, MinistralForCausalLM):
    """Causal language model."""

    config: HybridMinistralConfig
    backbone_class = HybridMinistralModel
