"""Qwen2 hybrids; see hybrid_base.py."""

from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from .hybrid_base import HybridBackbone, HybridCausalLM, HybridFields
from .kept_attention import KeptAttention


class HybridQwen2Config(HybridFields, Qwen2Config):
    """Configuration of a Qwen2 hybrid."""

    model_type = "hybrid_qwen2"


class KeptQwen2Attention(KeptAttention, Qwen2Attention):
    """Attention that a hybrid changes."""


class HybridQwen2Model(HybridBackbone, Qwen2Model):
    """Decoder without a head."""

    config: HybridQwen2Config
    kept_attention_class = KeptQwen2Attention


class HybridQwen2ForCausalLM(HybridCausalLM, Qwen2ForCausalLM):
    """Causal language model."""

    config: HybridQwen2Config
    backbone_class = HybridQwen2Model
