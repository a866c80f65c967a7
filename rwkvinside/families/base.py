"""What a teacher family is to the rest of the package.

That is, where its modules are, and what its attention turns into. The defaults describe a decoder in the layout of
Llama, which Qwen shares: norms before attention and MLP, separate query, key and value projections, a gated MLP. A
family says what differs.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple, cast

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import UserError
from ..modeling.mixer_presets import TimeMixerConfig
from ..modeling.registry import hybrid_class

WEIGHT_MAP = {
    "q_proj.weight": "receptance.weight",
    "k_proj.weight": "key.weight",
    "v_proj.weight": "value.weight",
    "o_proj.weight": "output.weight",
    "q_proj.bias": "receptance.bias",
    "k_proj.bias": "key.bias",
    "v_proj.bias": "value.bias",
    "o_proj.bias": "output.bias",
}

# Caps and factors of logits and sums in other architectures, which would be left out in silence.
SCALES = (
    *("attn_logit_softcapping", "final_logit_softcapping", "logit_scale", "logits_scaling"),
    *("attention_multiplier", "embedding_multiplier", "residual_multiplier"),
)


class BlockLinears(NamedTuple):
    """The linear layers of an attention or an MLP.

    Attributes:
        inputs: those that read the block's input.
        output: the one that they feed, whose output is the block's.
    """

    inputs: tuple[nn.Module, ...]
    output: nn.Module


class Family(ABC):
    """A teacher family, without state: one object serves every model of the family.

    Attributes:
        model_type: of the teacher's configuration.
        hybrid: model_type of its hybrids, a name of `modeling.registry`.
        weight_map: tensor of the attention -> tensor of the mixer; optional ones exist on both sides or on neither.
        embedding_path, layers_path, final_norm_path, head_path: where modules are below the causal language model.
        attention_path, mlp_path, attention_norm_path, mlp_norm_path: where they are below a decoder layer.
        attention_inputs, attention_output, mlp_inputs, mlp_output: linear layers below an attention and an MLP.
        block_ends: paths below a decoder layer of the linear layers whose output is added to the residual stream.
    """

    model_type: ClassVar[str]
    hybrid: ClassVar[str]
    weight_map: ClassVar[dict[str, str]] = WEIGHT_MAP

    embedding_path: ClassVar[str] = "model.embed_tokens"
    layers_path: ClassVar[str] = "model.layers"
    final_norm_path: ClassVar[str] = "model.norm"
    head_path: ClassVar[str] = "lm_head"

    attention_path: ClassVar[str] = "self_attn"
    mlp_path: ClassVar[str] = "mlp"
    attention_norm_path: ClassVar[str] = "input_layernorm"
    mlp_norm_path: ClassVar[str] = "post_attention_layernorm"

    attention_inputs: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj")
    attention_output: ClassVar[str] = "o_proj"
    mlp_inputs: ClassVar[tuple[str, ...]] = ("gate_proj", "up_proj")
    mlp_output: ClassVar[str] = "down_proj"
    block_ends: ClassVar[tuple[str, ...]] = ("self_attn.o_proj", "mlp.down_proj")

    def check(self, config: PretrainedConfig) -> None:
        """Refuse a teacher that no hybrid of this family can be made from.

        Raises:
            UserError: names the property of the configuration, and the reason.
        """
        kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
        if "sliding_attention" in kinds:
            raise UserError(
                "the teacher has sliding-window attention layers, which are not supported",
                "use a teacher whose layers all see the whole context",
            )
        if kinds:
            raise UserError(
                f"the teacher has layers of kind {min(kinds)}, which are not supported",
                "use a teacher whose layers are all full_attention",
            )
        for name in SCALES:
            if (value := getattr(config, name, None)) not in (None, 1, 1.0):
                raise UserError(
                    f"the teacher has {name} = {value!r}, which is not computed here", "use a teacher without it"
                )

    @abstractmethod
    def attention_fields(self, config: PretrainedConfig, layer: int) -> dict:
        """Return the fields of `TimeMixerConfig` that the attention of a layer determines."""

    def mixer_config(self, config: PretrainedConfig, layer: int, preset: str, **overrides: Any) -> TimeMixerConfig:
        """Return the configuration of the mixer that replaces the attention of a layer.

        Args:
            config: the teacher's.
            layer: index of the decoder layer.
            preset: a name of `modeling.mixer_presets.PRESETS`.
            overrides: fields of `TimeMixerConfig`.
        """
        return TimeMixerConfig.from_preset(preset, **self.attention_fields(config, layer) | overrides)

    @property
    def hybrid_class(self) -> type[PreTrainedModel]:
        """The causal language model that hybrids of this family are exported as."""
        return hybrid_class(self.hybrid)

    def layers(self, lm: PreTrainedModel) -> nn.ModuleList:
        """Return the decoder layers."""
        return cast(nn.ModuleList, lm.get_submodule(self.layers_path))

    def embedding(self, lm: PreTrainedModel) -> nn.Module:
        """Return the input embedding."""
        return lm.get_submodule(self.embedding_path)

    def final_norm(self, lm: PreTrainedModel) -> nn.Module:
        """Return the norm whose output the head reads."""
        return lm.get_submodule(self.final_norm_path)

    def head(self, lm: PreTrainedModel) -> nn.Module:
        """Return the output head."""
        return lm.get_submodule(self.head_path)

    def attention(self, layer: nn.Module) -> nn.Module:
        """Return a decoder layer's attention, or what has replaced it."""
        return layer.get_submodule(self.attention_path)

    def set_attention(self, layer: nn.Module, module: nn.Module) -> None:
        """Replace a decoder layer's attention."""
        layer.set_submodule(self.attention_path, module)

    def mlp(self, layer: nn.Module) -> nn.Module:
        """Return the feed-forward block of a decoder layer."""
        return layer.get_submodule(self.mlp_path)

    def attention_input(self, layer: nn.Module) -> nn.Module:
        """Return the module between the residual stream and the attention."""
        return layer.get_submodule(self.attention_norm_path)

    def mlp_input(self, layer: nn.Module) -> nn.Module:
        """Return the module between the residual stream and the MLP."""
        return layer.get_submodule(self.mlp_norm_path)

    def attention_linears(self, attention: nn.Module) -> BlockLinears:
        """Return the projections of the family's attention.

        The last one's input is the outputs of the heads.
        """
        return _linears(attention, self.attention_inputs, self.attention_output)

    def mlp_linears(self, layer: nn.Module) -> BlockLinears:
        """Return the linear layers of a decoder layer's MLP."""
        return _linears(self.mlp(layer), self.mlp_inputs, self.mlp_output)

    def layer_of(self, name: str) -> int | None:
        """Return the index of the decoder layer that a parameter or module is in.

        Args:
            name: below the causal language model.
        """
        match = re.match(rf"{re.escape(self.layers_path)}\.(\d+)\.", name)
        return None if match is None else int(match[1])

    def group_of(self, name: str) -> tuple[str, ...]:
        """Return the groups of a parameter of the teacher, from wide to narrow.

        Args:
            name: below the causal language model.

        Returns:
            Names of `hybrid.freezing.GROUPS`, as if no layer were converted.
        """
        for path, group in ((self.embedding_path, "embed"), (self.head_path, "head")):
            if name.startswith(f"{path}."):
                return (group,)
        _, _, inside = name.removeprefix(f"{self.layers_path}.").partition(".")
        for path, group in ((self.attention_path, "attention"), (self.mlp_path, "mlp")):
            if self.layer_of(name) is not None and inside.startswith(f"{path}."):
                return (group,)
        return ("norms",)

    def attention_part(self, name: str) -> str:
        """Return which module or tensor of an attention a parameter's name leads to."""
        _, _, inside = name.partition(f".{self.attention_path}.")
        return inside.split(".")[0]

    def _attention_fields(self, config: PretrainedConfig, *, qkv_bias: bool, output_bias: bool, qk_norm: bool) -> dict:
        """Return `attention_fields` of a layer with the same heads as all others."""
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return {
            "hidden_size": config.hidden_size,
            "num_heads": config.num_attention_heads,
            "num_kv_heads": config.num_key_value_heads,
            "head_size": head_size,
            "qkv_bias": qkv_bias,
            "output_bias": output_bias,
            "qk_norm": qk_norm,
            "norm_eps": config.rms_norm_eps,
        }


def _linears(block: nn.Module, inputs: tuple[str, ...], output: str) -> BlockLinears:
    return BlockLinears(tuple(block.get_submodule(name) for name in inputs), block.get_submodule(output))
