"""Granite hybrids; see hybrid_base.py."""

from transformers import GraniteConfig, GraniteForCausalLM, GraniteModel
from transformers.models.granite.modeling_granite import GraniteAttention

from .hybrid_base import HybridBackbone, HybridCausalLM, HybridFields, UnrotatedAttention


class HybridGraniteConfig(HybridFields, GraniteConfig):
    """Configuration of a Granite hybrid."""

    model_type = "hybrid_granite"


class UnrotatedGraniteAttention(UnrotatedAttention, GraniteAttention):  # type: ignore[misc]  # other names of arguments
    """Attention without positions."""


class HybridGraniteModel(HybridBackbone, GraniteModel):
    """Decoder without a head."""

    config: HybridGraniteConfig
    unrotated_attention_class = UnrotatedGraniteAttention


class HybridGraniteForCausalLM(HybridCausalLM, GraniteForCausalLM):
    """Causal language model."""

    config: HybridGraniteConfig
    backbone_class = HybridGraniteModel
