"""Phi-3 and Phi-4: query, key and value in one projection, gate and up in one, rotation of a part of each head."""

import torch
from transformers import PretrainedConfig

from .base import Family, Source


class Phi3(Family):
    """Phi-3 and Phi-4."""

    model_type = "phi3"
    hybrid = "hybrid_phi3"
    attention_inputs = ("qkv_proj",)
    mlp_inputs = ("gate_up_proj",)

    def attention_fields(self, config: PretrainedConfig, layer: int) -> dict:
        """Return the fields of `TimeMixerConfig` that the attention determines."""
        return self._attention_fields(config, qkv_bias=False, output_bias=False, qk_norm=False)

    def sources(self, config: PretrainedConfig, layer: int) -> dict[str, Source]:
        """Return where the tensors of a layer's mixer come from, by their names there."""
        fields = self.attention_fields(config, layer)
        q, kv = (fields[name] * fields["head_size"] for name in ("num_heads", "num_kv_heads"))
        sources, first = super().sources(config, layer), 0
        for part, size in (("receptance", q), ("key", kv), ("value", kv)):
            rows = sources[f"{part}.weight"].rows
            rows = first + (torch.arange(size) if rows is None else rows)
            sources[f"{part}.weight"] = sources[f"{part}.weight"]._replace(name="qkv_proj.weight", rows=rows)
            first += size
        return sources
