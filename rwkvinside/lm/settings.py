"""Settings of a language model that is trained from nothing: its shapes, and the knobs of its RWKV layers."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from ..support.settings import Count, Fraction, Positive, Section


class ModelShape(Section):
    """The model's shapes: fields of its family's Hugging Face configuration."""

    family: str = Field("llama", description="model_type of a family (docs/families.md).")
    hidden_size: Positive = Field(description="Width of the residual stream.")
    num_hidden_layers: Positive = Field(description="Layers.")
    num_attention_heads: Positive = Field(description="Heads of attention and of RWKV layers.")
    num_key_value_heads: Positive | None = Field(None, description="Heads of keys and values; null: as many.")
    head_dim: Positive | None = Field(None, description="Size of a head; null: width / heads.")
    intermediate_size: Positive | None = Field(
        None, description="Inner width of the MLP; null: 8/3 of the width, in steps of 64."
    )
    vocab_size: Positive | None = Field(
        None, description="Rows of the embedding; null: the tokenizer's ids, in steps of 64."
    )
    max_position_embeddings: Positive | None = Field(
        None, description="Longest row that the model is made for; null: the longest that it is trained on."
    )
    fields: dict[str, Any] = Field({}, description="More fields of that configuration, such as rope_theta.")


class LanguageModelConfig(Section):
    """What a run from nothing has beside the settings of any run."""

    known_as: ClassVar = {
        "rwkv_layer_indices": "student.attention_layers, which names the other layers",
        "transformer_layer_indices": "student.attention_layers",
        "max_seq_length": "stages.pretrain.data.seq_len, or the flag --max_seq_length",
    }
    model: ModelShape = Field(description="Its shapes.")
    tokenizer: str = Field(description="bytes, the directory of a Hugging Face tokenizer, or a hub id.")
    use_rwkv: bool = Field(True, description="false: every layer is attention, the plain transformer.")
    rwkv_time_mix_ratio: Fraction = Field(
        1.0,
        description="Share of RWKV-7's token shift that x070 begins with; 0: a token begins by seeing itself alone.",
    )
    rwkv_use_linear_att: bool = Field(
        False, description="Ablation of x070: linear attention, without decay and in-context learning rate."
    )
    rwkv_att_scale: Annotated[float, Field(gt=0)] = Field(
        1.0, description="Factor of what the output projections of RWKV layers read."
    )
    rwkv_chunk_size: Count = Field(1024, description="Tokens at a time when the model is processed by its state.")
