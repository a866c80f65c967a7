"""What a teacher family is to the rest of the package.

That is, where its modules are, what its attention turns into, and what it makes of its head's output. The defaults
describe a decoder in the layout of Llama, which Qwen shares: norms before attention and MLP, separate query, key and
value projections, a gated MLP. A family says what differs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import UserError
from ..modeling.kept_attention import own_window
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
QK_NORMS = {"q_norm.weight": "r_norm.weight", "k_norm.weight": "k_norm.weight"}


class Source(NamedTuple):
    """Where a tensor of a mixer comes from: (rows of a tensor of the attention + plus) * factor.

    Attributes:
        name: of the attention's tensor.
        rows: which of its rows, in the mixer's order, 1-d int64; None: all, in their own.
        plus: 1 for a norm that multiplies with 1 + its weight.
        factor: what makes scores of r . k / sqrt(N) the teacher's; 1 where they are.
    """

    name: str
    rows: Tensor | None = None
    plus: float = 0.0
    factor: float = 1.0


class LogitShape(NamedTuple):
    """What a model makes of its head's output x: cap * tanh(x / divisor / cap), without a cap x / divisor."""

    divisor: float = 1.0
    cap: float | None = None


class Experts(NamedTuple):
    """The experts of a sparse MLP; every token goes through `chosen` of them.

    Attributes:
        inputs, output: 3-D weights (experts, out, in) of gate and up in one, and of down.
        router: (experts, D), what chooses.
        chosen: experts of a token.
    """

    inputs: nn.Parameter
    output: nn.Parameter
    router: nn.Parameter
    chosen: int


# Caps and factors of logits and sums in some architectures, which others would leave out in silence.
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
        interleaved: the rotation turns pairs of neighbors, not of the two halves of a head.
        norm_plus: what the norms of query and key add to their weights.
        scales: those of `SCALES` that are computed.
        llama_layers: decoder layers are Llama's (RMSNorm, attention, RMSNorm, SwiGLU, nothing multiplied), but for
            biases, norms of query and key, windows and where it rotates; other programs compute such layers alone.
        embedding_path, layers_path, final_norm_path, head_path: where modules are below the causal language model.
        attention_path, mlp_path: where they are below a decoder layer.
        attention_norm_path, mlp_norm_path: norms before them, below a decoder layer; None: they read the residual
            stream itself.
        attention_post_norm_path, mlp_post_norm_path: norms between them and the residual stream; None: there are none.
        attention_inputs, attention_output, mlp_inputs, mlp_output: linear layers below an attention and an MLP.
    """

    model_type: ClassVar[str]
    hybrid: ClassVar[str]
    weight_map: ClassVar[dict[str, str]] = WEIGHT_MAP
    interleaved: ClassVar[bool] = False
    norm_plus: ClassVar[float] = 0.0
    scales: ClassVar[tuple[str, ...]] = ()
    llama_layers: ClassVar[bool] = False

    embedding_path: ClassVar[str] = "model.embed_tokens"
    layers_path: ClassVar[str] = "model.layers"
    final_norm_path: ClassVar[str] = "model.norm"
    head_path: ClassVar[str] = "lm_head"

    attention_path: ClassVar[str] = "self_attn"
    mlp_path: ClassVar[str] = "mlp"
    attention_norm_path: ClassVar[str | None] = "input_layernorm"
    mlp_norm_path: ClassVar[str | None] = "post_attention_layernorm"
    attention_post_norm_path: ClassVar[str | None] = None
    mlp_post_norm_path: ClassVar[str | None] = None

    attention_inputs: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj")
    attention_output: ClassVar[str] = "o_proj"
    mlp_inputs: ClassVar[tuple[str, ...]] = ("gate_proj", "up_proj")
    mlp_output: ClassVar[str] = "down_proj"

    def check(self, config: PretrainedConfig) -> None:
        """Refuse a teacher that no hybrid of this family can be made from.

        Raises:
            UserError: names the property of the configuration, and the reason.
        """
        kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if getattr(config, "use_bidirectional_attention", None):
            raise UserError(
                "the teacher has use_bidirectional_attention: its tokens see those after them, as no recurrence can",
                "use a causal teacher",
            )
        if kinds:
            raise UserError(
                f"the teacher has layers of kind {min(kinds)}, which are not supported",
                "use a teacher whose layers are all full_attention or sliding_attention",
            )
        for name in SCALES:
            if name not in self.scales and (value := getattr(config, name, None)) not in (None, 1, 1.0):
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

    def sources(self, config: PretrainedConfig, layer: int) -> dict[str, Source]:
        """Return where the tensors of a layer's mixer come from, by their names there.

        The mixer rotates the two halves of a head, whatever the teacher rotates: the dimensions of its queries and keys
        come in that order. What multiplies the teacher's scores is in the queries, or in their norm.
        """
        fields = self.attention_fields(config, layer)
        heads = {"receptance": fields["num_heads"], "key": fields["num_kv_heads"], "r_norm": 1, "k_norm": 1}
        order = head_order(fields["head_size"], self.rotated(config, fields["head_size"]), self.interleaved)
        scale = self.score_scale(config, layer)
        factor = 1.0 if scale is None else scale * fields["head_size"] ** 0.5
        sources = {}
        for name, target in self.weight_map.items():
            part = target.partition(".")[0]
            is_norm = part in ("r_norm", "k_norm")
            scaled = part == ("r_norm" if fields["qk_norm"] else "receptance")
            sources[target] = Source(
                name,
                rows=None if order is None or part not in heads else _repeated(order, heads[part]),
                plus=self.norm_plus if is_norm else 0.0,
                factor=factor if scaled else 1.0,
            )
        return sources

    def rotated(self, config: PretrainedConfig, head_size: int) -> int:
        """Return how many dimensions of a head are rotated, the first ones."""
        parameters = getattr(config, "rope_parameters", None) or {}
        return int(head_size * parameters.get("partial_rotary_factor", 1.0))

    def window(self, config: PretrainedConfig, layer: int) -> int | None:
        """Return how many tokens the attention of a layer sees, a token itself included; None: all before it."""
        return own_window(config, layer)

    def score_scale(self, config: PretrainedConfig, layer: int) -> float | None:
        """Return what the products of queries and keys are multiplied with; None: 1 / sqrt(head size)."""
        return None

    def residual_scale(self, config: PretrainedConfig) -> float:
        """Return what the outputs of attention and MLP are multiplied with before they join the residual stream."""
        return 1.0

    def logit_shape(self, config: PretrainedConfig) -> LogitShape:
        """Return what the model makes of its head's output."""
        return LogitShape()

    @property
    def block_ends(self) -> tuple[str, ...]:
        """Paths below a decoder layer of the linear layers whose output joins the residual stream with no norm between.

        None of a sparse MLP is one.
        """
        ends = (
            (self.attention_post_norm_path, self.attention_path, self.attention_output),
            (self.mlp_post_norm_path, self.mlp_path, self.mlp_output),
        )
        return tuple(f"{path}.{output}" for norm, path, output in ends if norm is None)

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
        """Return the module between the residual stream and the attention, where there is none an identity."""
        return _submodule(layer, self.attention_norm_path)

    def mlp_input(self, layer: nn.Module) -> nn.Module:
        """Return the module between the residual stream and the MLP, where there is none an identity."""
        return _submodule(layer, self.mlp_norm_path)

    def attention_post_norm(self, layer: nn.Module) -> nn.Module:
        """Return the module between the attention and the residual stream, where there is none an identity."""
        return _submodule(layer, self.attention_post_norm_path)

    def mlp_post_norm(self, layer: nn.Module) -> nn.Module:
        """Return the module between the MLP and the residual stream, where there is none an identity."""
        return _submodule(layer, self.mlp_post_norm_path)

    def attention_linears(self, attention: nn.Module) -> BlockLinears:
        """Return the projections of the family's attention.

        The last one's input is the outputs of the heads.
        """
        return _linears(attention, self.attention_inputs, self.attention_output)

    def mlp_linears(self, layer: nn.Module) -> BlockLinears:
        """Return the linear layers of a decoder layer's MLP, which has no experts."""
        return _linears(self.mlp(layer), self.mlp_inputs, self.mlp_output)

    def experts(self, mlp: nn.Module) -> Experts | None:
        """Return the experts of an MLP; None: it is another module, or every token goes through all of it."""
        return None

    def layer_of(self, name: str) -> int | None:
        """Return the index of the decoder layer that a parameter or module is in.

        Args:
            name: below the causal language model.
        """
        index, dot, _ = name.removeprefix(before := f"{self.layers_path}.").partition(".")
        return int(index) if dot and index.isdecimal() and name.startswith(before) else None

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
        if self.layer_of(name) is None:
            return ("norms",)
        _, _, inside = name.removeprefix(f"{self.layers_path}.").partition(".")
        for path, group in ((self.attention_path, "attention"), (self.mlp_path, "mlp")):
            if inside.startswith(f"{path}."):
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


def _submodule(layer: nn.Module, path: str | None) -> nn.Module:
    return nn.Identity() if path is None else layer.get_submodule(path)


def _repeated(order: Tensor, heads: int) -> Tensor:
    return (torch.arange(heads)[:, None] * len(order) + order).flatten()


def head_order(head_size: int, rotated: int, interleaved: bool) -> Tensor | None:
    """Return the order of a head's dimensions in which a rotation turns its two halves.

    Args:
        head_size: N.
        rotated: R, how many dimensions the teacher rotates, the first ones: i with i + R / 2, or 2 i with 2 i + 1.
        interleaved: the latter.

    Returns:
        (N,) int64: which of the teacher's dimensions each one is; None: it is the teacher's order. Dimensions that are
        not rotated follow those that are, in either half.
    """
    if rotated == head_size and not interleaved:
        return None
    dims = torch.arange(head_size)
    pairs = dims[:rotated].view(-1, 2).t() if interleaved else dims[:rotated].view(2, -1)
    return torch.cat([pairs, dims[rotated:].view(2, -1)], 1).flatten()
