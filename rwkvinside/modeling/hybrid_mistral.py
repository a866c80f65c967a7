"""Mistral hybrids; see hybrid_base.py."""

from transformers import MistralConfig, MistralForCausalLM, MistralModel
from transformers.models.mistral.modeling_mistral import MistralAttention

from .hybrid_base import HybridBackbone, HybridCausalLM, HybridFields
from .kept_attention import KeptAttention


class HybridMistralConfig(HybridFields, MistralConfig):
    """Configuration of a Mistral hybrid."""

    model_type = "hybrid_mistral"


class KeptMistralAttention(KeptAttention, MistralAttention):
    """Attention that a hybrid changes."""


class HybridMistralModel(HybridBackbone, MistralModel):
    """Decoder without a head."""

    config: HybridMistralConfig
    kept_attention_class = KeptMistralAttention


class HybridMistralForCausalLM(HybridCausalLM, MistralForCausalLM):
    """Causal language model."""

    config: HybridMistralConfig
    backbone_class = HybridMistralModel
