"""Granite hybrids; see hybrid_base.py."""

from transformers import GraniteConfig, GraniteForCausalLM, GraniteModel
from transformers.models.granite.modeling_granite import GraniteAttention

from .hybrid_base import HybridBackbone, HybridCausalLM, HybridFields
from .kept_attention import KeptAttention


class HybridGraniteConfig(HybridFields, GraniteConfig):
    """Configuration of a Granite hybrid."""

    model_type = "hybrid_granite"


class KeptGraniteAttention(KeptAttention, GraniteAttention):  # type: ignore[misc]  # other names of arguments
    """Attention that a hybrid changes."""


class HybridGraniteModel(HybridBackbone, GraniteModel):
    """Decoder without a head."""

    config: HybridGraniteConfig
    kept_attention_class = KeptGraniteAttention


class HybridGraniteForCausalLM(HybridCausalLM, GraniteForCausalLM):
    """Causal language model."""

    config: HybridGraniteConfig
    backbone_class = HybridGraniteModel
