"""Qwen2 hybrids: the family's own decoder in which some layers mix time by RWKV-7; see hybrid_base.py."""

from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from .hybrid_base import HybridBackbone, HybridCausalLM, HybridFields, UnrotatedAttention


class HybridQwen2Config(HybridFields, Qwen2Config):
    model_type = "hybrid_qwen2"


class UnrotatedQwen2Attention(UnrotatedAttention, Qwen2Attention):
    pass


class HybridQwen2Model(HybridBackbone, Qwen2Model):
    config: HybridQwen2Config
    unrotated_attention_class = UnrotatedQwen2Attention


class HybridQwen2ForCausalLM(HybridCausalLM, Qwen2ForCausalLM):
    config: HybridQwen2Config
    backbone_class = HybridQwen2Model
