"""The table of hybrid models, each imported when asked for.

Imports neither torch nor transformers.
"""

from importlib import import_module
from typing import Any

# model_type of a hybrid's configuration -> "module:Class" of its causal language model in this package
HYBRIDS = {
    "hybrid_llama": "hybrid_llama:HybridLlamaForCausalLM",
    "hybrid_qwen2": "hybrid_qwen2:HybridQwen2ForCausalLM",
    "hybrid_qwen3": "hybrid_qwen3:HybridQwen3ForCausalLM",
    "hybrid_mistral": "hybrid_mistral:HybridMistralForCausalLM",
    "hybrid_ministral": "hybrid_ministral:HybridMinistralForCausalLM",
    "hybrid_smollm3": "hybrid_smollm3:HybridSmolLM3ForCausalLM",
    "hybrid_granite": "hybrid_granite:HybridGraniteForCausalLM",
    "hybrid_phi3": "hybrid_phi3:HybridPhi3ForCausalLM",
    "hybrid_olmo2": "hybrid_olmo2:HybridOlmo2ForCausalLM",
    "hybrid_qwen3_moe": "hybrid_qwen3_moe:HybridQwen3MoeForCausalLM",
    "hybrid_gemma3_text": "hybrid_gemma3_text:HybridGemma3TextForCausalLM",
    "hybrid_gemma2": "hybrid_gemma2:HybridGemma2ForCausalLM",
    "hybrid_glm4": "hybrid_glm4:HybridGlm4ForCausalLM",
}


def hybrid_class(model_type: str) -> Any:
    """Return the causal language model class of a hybrid.

    Its `config_class` is the class of the configuration.
    """
    module, _, name = HYBRIDS[model_type].partition(":")
    return getattr(import_module(f".{module}", __package__), name)
