"""Gemma 3 hybrids; see hybrid_base.py."""

from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Gemma3TextModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention

from .hybrid_base import HybridBackbone, HybridCausalLM, HybridFields
from .kept_attention import KeptAttention


class HybridGemma3TextConfig(HybridFields, Gemma3TextConfig):
    """Configuration of a Gemma 3 hybrid."""

    model_type = "hybrid_gemma3_text"


class KeptGemma3TextAttention(KeptAttention, Gemma3Attention):  # type: ignore[misc]  # other names of arguments
    """Attention that a hybrid changes."""


class HybridGemma3TextModel(HybridBackbone, Gemma3TextModel):
    """Decoder without a head."""

    config: HybridGemma3TextConfig
    kept_attention_class = KeptGemma3TextAttention


class HybridGemma3TextForCausalLM(HybridCausalLM, Gemma3ForCausalLM):
    """Causal language model."""

    config: HybridGemma3TextConfig
    backbone_class = HybridGemma3TextModel
