"""Llama hybrids; see hybrid_base.py."""

from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaAttention

from .hybrid_base import HybridBackbone, HybridCausalLM, HybridFields
from .kept_attention import KeptAttention


class HybridLlamaConfig(HybridFields, LlamaConfig):
    """Configuration of a Llama hybrid."""

    model_type = "hybrid_llama"


class KeptLlamaAttention(KeptAttention, LlamaAttention):  # type: ignore[misc]  # here a rotation is required
    """Attention that a hybrid changes."""


class HybridLlamaModel(HybridBackbone, LlamaModel):
    """Decoder without a head."""

    config: HybridLlamaConfig
    kept_attention_class = KeptLlamaAttention


class HybridLlamaForCausalLM(HybridCausalLM, LlamaForCausalLM):
    """Causal language model."""

    config: HybridLlamaConfig
    backbone_class = HybridLlamaModel
