"""Gemma 3 hybrids; see hybrid_base.py."""

from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Gemma3TextModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention

from .hybrid_base import HybridBackbone, HybridCausalLM, HybridFields, UnrotatedAttention


class HybridGemma3TextConfig(HybridFields, Gemma3TextConfig):
    """Configuration of a Gemma 3 hybrid."""

    model_type = "hybrid_gemma3_text"


class UnrotatedGemma3TextAttention(UnrotatedAttention, Gemma3Attention):  # type: ignore[misc]  # other names of arguments
    """Attention without positions."""


class HybridGemma3TextModel(HybridBackbone, Gemma3TextModel):
    """Decoder without a head."""

    config: HybridGemma3TextConfig
    unrotated_attention_class = UnrotatedGemma3TextAttention


class HybridGemma3TextForCausalLM(HybridCausalLM, Gemma3ForCausalLM):
    """Causal language model."""

    config: HybridGemma3TextConfig
    backbone_class = HybridGemma3TextModel
