"""Mistral hybrids; see hybrid_base.py."""

from transformers import MistralConfig, MistralForCausalLM, MistralModel
from transformers.models.mistral.modeling_mistral import MistralAttention

from .hybrid_base import HybridBackbone, HybridCausalLM, HybridFields, UnrotatedAttention


class HybridMistralConfig(HybridFields, MistralConfig):
    """Configuration of a Mistral hybrid."""

    model_type = "hybrid_mistral"


class UnrotatedMistralAttention(UnrotatedAttention, MistralAttention):
    """Attention without positions."""


class HybridMistralModel(HybridBackbone, MistralModel):
    """Decoder without a head."""

    config: HybridMistralConfig
    unrotated_attention_class = UnrotatedMistralAttention


class HybridMistralForCausalLM(HybridCausalLM, MistralForCausalLM):
    """Causal language model."""

    config: HybridMistralConfig
    backbone_class = HybridMistralModel
