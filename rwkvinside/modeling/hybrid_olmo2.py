"""OLMo 2 hybrids; see hybrid_base.py."""

from transformers import Olmo2Config, Olmo2ForCausalLM, Olmo2Model
from transformers.models.olmo2.modeling_olmo2 import Olmo2Attention

from .hybrid_base import HybridBackbone, HybridCausalLM, HybridFields
from .kept_attention import KeptAttention


class HybridOlmo2Config(HybridFields, Olmo2Config):
    """Configuration of a OLMo 2 hybrid."""

    model_type = "hybrid_olmo2"


class KeptOlmo2Attention(KeptAttention, Olmo2Attention):
    """Attention that a hybrid changes."""


class HybridOlmo2Model(HybridBackbone, Olmo2Model):
    """Decoder without a head."""

    config: HybridOlmo2Config
    kept_attention_class = KeptOlmo2Attention


class HybridOlmo2ForCausalLM(HybridCausalLM, Olmo2ForCausalLM):
    """Causal language model."""

    config: HybridOlmo2Config
    backbone_class = HybridOlmo2Model
