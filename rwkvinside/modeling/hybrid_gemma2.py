"""Gemma 2 hybrids; see hybrid_base.py."""

from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma2Model
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention

from .hybrid_base import HybridBackbone, HybridCausalLM, HybridFields
from .kept_attention import KeptAttention


class HybridGemma2Config(HybridFields, Gemma2Config):
    """Configuration of a Gemma 2 hybrid."""

    model_type = "hybrid_gemma2"


class KeptGemma2Attention(KeptAttention, Gemma2Attention):  # type: ignore[misc]  # other names of arguments
    """Attention that a hybrid changes."""


class HybridGemma2Model(HybridBackbone, Gemma2Model):
    """Decoder without a head."""

    config: HybridGemma2Config
    kept_attention_class = KeptGemma2Attention


class HybridGemma2ForCausalLM(HybridCausalLM, Gemma2ForCausalLM):
    """Causal language model."""

    config: HybridGemma2Config
    backbone_class = HybridGemma2Model
