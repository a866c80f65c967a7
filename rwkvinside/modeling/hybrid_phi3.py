"""Phi-3 hybrids; see hybrid_base.py."""

from transformers import Phi3Config, Phi3ForCausalLM, Phi3Model
from transformers.models.phi3.modeling_phi3 import Phi3Attention

from .hybrid_base import HybridBackbone, HybridCausalLM, HybridFields
from .kept_attention import KeptAttention


class HybridPhi3Config(HybridFields, Phi3Config):
    """Configuration of a Phi-3 hybrid."""

    model_type = "hybrid_phi3"


class KeptPhi3Attention(KeptAttention, Phi3Attention):  # type: ignore[misc]  # other names of arguments
    """Attention that a hybrid changes."""


class HybridPhi3Model(HybridBackbone, Phi3Model):
    """Decoder without a head."""

    config: HybridPhi3Config
    kept_attention_class = KeptPhi3Attention


class HybridPhi3ForCausalLM(HybridCausalLM, Phi3ForCausalLM):
    """Causal language model."""

    config: HybridPhi3Config
    backbone_class = HybridPhi3Model
