"""SmolLM3 hybrids; see hybrid_base.py."""

from transformers import SmolLM3Config, SmolLM3ForCausalLM, SmolLM3Model
from transformers.models.smollm3.modeling_smollm3 import SmolLM3Attention

from .hybrid_base import HybridBackbone, HybridCausalLM, HybridFields
from .kept_attention import KeptAttention


class HybridSmolLM3Config(HybridFields, SmolLM3Config):
    """Configuration of a SmolLM3 hybrid."""

    model_type = "hybrid_smollm3"


class KeptSmolLM3Attention(KeptAttention, SmolLM3Attention):
    """Attention that a hybrid changes."""


class HybridSmolLM3Model(HybridBackbone, SmolLM3Model):
    """Decoder without a head."""

    config: HybridSmolLM3Config
    kept_attention_class = KeptSmolLM3Attention


class HybridSmolLM3ForCausalLM(HybridCausalLM, SmolLM3ForCausalLM):
    """Causal language model."""

    config: HybridSmolLM3Config
    backbone_class = HybridSmolLM3Model
