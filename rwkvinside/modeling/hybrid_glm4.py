"""GLM-4 hybrids; see hybrid_base.py."""

from transformers import Glm4Config, Glm4ForCausalLM, Glm4Model
from transformers.models.glm4.modeling_glm4 import Glm4Attention

from .hybrid_base import HybridBackbone, HybridCausalLM, HybridFields
from .kept_attention import KeptAttention


class HybridGlm4Config(HybridFields, Glm4Config):
    """Configuration of a GLM-4 hybrid."""

    model_type = "hybrid_glm4"


class KeptGlm4Attention(KeptAttention, Glm4Attention):  # type: ignore[misc]  # other names of arguments
    """Attention that a hybrid changes."""


class HybridGlm4Model(HybridBackbone, Glm4Model):
    """Decoder without a head."""

    config: HybridGlm4Config
    kept_attention_class = KeptGlm4Attention


class HybridGlm4ForCausalLM(HybridCausalLM, Glm4ForCausalLM):
    """Causal language model."""

    config: HybridGlm4Config
    backbone_class = HybridGlm4Model
