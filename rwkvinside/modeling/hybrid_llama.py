"""Llama hybrids; see hybrid_base.py."""

from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaAttention

from .hybrid_base import HybridBackbone, HybridCausalLM, HybridFields, UnrotatedAttention


class HybridLlamaConfig(HybridFields, LlamaConfig):
    """Configuration of a Llama hybrid."""

    model_type = "hybrid_llama"


class UnrotatedLlamaAttention(UnrotatedAttention, LlamaAttention):  # type: ignore[misc]  # here a rotation is required
    """Attention without positions."""


class HybridLlamaModel(HybridBackbone, LlamaModel):
    """Decoder without a head."""

    config: HybridLlamaConfig
    unrotated_attention_class = UnrotatedLlamaAttention


class HybridLlamaForCausalLM(HybridCausalLM, LlamaForCausalLM):
    """Causal language model."""

    config: HybridLlamaConfig
    backbone_class = HybridLlamaModel
