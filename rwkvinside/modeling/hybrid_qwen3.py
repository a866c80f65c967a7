"""Qwen3 hybrids; see hybrid_base.py."""

from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from .hybrid_base import HybridBackbone, HybridCausalLM, HybridFields
from .kept_attention import KeptAttention


class HybridQwen3Config(HybridFields, Qwen3Config):
    """Configuration of a Qwen3 hybrid."""

    model_type = "hybrid_qwen3"


class KeptQwen3Attention(KeptAttention, Qwen3Attention):
    """Attention that a hybrid changes."""


class HybridQwen3Model(HybridBackbone, Qwen3Model):
    """Decoder without a head."""

    config: HybridQwen3Config
    kept_attention_class = KeptQwen3Attention


class HybridQwen3ForCausalLM(HybridCausalLM, Qwen3ForCausalLM):
    """Causal language model."""

    config: HybridQwen3Config
    backbone_class = HybridQwen3Model
