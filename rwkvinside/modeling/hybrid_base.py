"""What the hybrids of all families share.

A hybrid is a teacher family's own decoder in which some layers mix time by RWKV-7. Embeddings, norms, MLPs and the kept
attention layers are transformers' own classes; only `self_attn` of the layers in `config.rwkv_layers` is another
module. Each `hybrid_<family>.py` puts these mixins over its family's classes. Their names avoid "rwkv" on purpose:
transformers gives models with that word in their name no default cache, and `generate()` could then neither chunk a
prefill nor continue from a cache. This file travels with exported models (torch and transformers only) and knows
nothing of training.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from .first_layer import ForwardContext, VFirstHolder
from .graphed_decoding import generate_graphed
from .kept_attention import is_cut
from .mixer_init import init_mixer
from .mixer_presets import TimeMixerConfig, check_first_layer
from .rwkv_attention import RWKVAttention

# Parameters that shift a sigmoid, the decay or a score: bf16 is too coarse for them (wl near -8 would be off by 2-3 %),
# so they stay fp32 in files and in memory whatever dtype the model is loaded in. Searched by transformers as regexes.
FP32_PARAMETERS = [rf"self_attn\.{name}$" for name in ("w0", "a0", "v0", "k0", "far_bias", "far_growth")]


@dataclass(kw_only=True, repr=False)
class HybridFields:
    """Mixin over a family's configuration: which layers are RWKV, and how they mix.

    Everything that the family's fields say keeps its meaning. `layer_types`, where a family has it, goes on telling
    transformers which masks and key/value slots to prepare; only `rwkv_layers` tells which layers are recurrent.

    Attributes:
        rwkv_layers: indices of the layers whose attention is an RWKV-7 time mixer, ascending. The first of them is the
            source of v_first and k_first.
        mixer: `TimeMixerConfig.to_dict()` of these layers.
        mixer_layers: fields in which the mixer of a layer differs from `mixer`, by its index as text; {} where all are
            equal.
        attention_rope: whether the layers that keep attention rotate their queries and keys (False: NoPE).
        attention_log_base: the a of their scores times log_a(position + a); None: scores are as they are.
        attention_window, attention_sinks: tokens that these layers see: the last so many, their own included, and the
            first so many of a document; 0 and 0: what the family's attention sees.
        rwkv_architecture: the preset the mixer was made from, for instance "cxa079".
        rwkv_chunk_size: tokens at a time when the model is processed by its state; None: no preference.
        teacher_model: name or path of the model that was converted; None: it was trained from nothing.
    """

    rwkv_layers: list = field(default_factory=list)
    mixer: dict | None = None
    mixer_layers: dict = field(default_factory=dict)
    attention_rope: bool = True
    attention_log_base: float | None = None
    attention_window: int = 0
    attention_sinks: int = 0
    rwkv_architecture: str | None = None
    rwkv_chunk_size: int | None = None
    teacher_model: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]  # of the family's configuration, which comes next
        count: int = self.num_hidden_layers  # type: ignore[attr-defined]  # a field of the family's configuration
        if any(not 0 <= i < count for i in self.rwkv_layers):
            raise ValueError(f"rwkv_layers={self.rwkv_layers}: the model has layers 0 to {count - 1}")
        if self.rwkv_layers != sorted(set(self.rwkv_layers)):
            raise ValueError(f"rwkv_layers={self.rwkv_layers} must be ascending, each layer once")
        if self.rwkv_layers and self.mixer is None:
            raise ValueError(f"rwkv_layers={self.rwkv_layers} needs the field mixer")
        if unknown := sorted(set(self.mixer_layers) - {str(i) for i in self.rwkv_layers}):
            raise ValueError(f"mixer_layers has {unknown}, rwkv_layers is {self.rwkv_layers}")
        if self.attention_log_base is not None and self.attention_log_base <= 1:
            raise ValueError(f"attention_log_base is {self.attention_log_base}: a logarithm needs more than 1")
        window, sinks = self.attention_window, self.attention_sinks
        if window < 0 or sinks < 0 or sinks and not window:
            raise ValueError(
                f"attention_window {window} and attention_sinks {sinks}: neither is negative, sinks need a window"
            )
        check_first_layer({i: self.mixer_config(i) for i in self.rwkv_layers})

    def mixer_config(self, layer: int) -> TimeMixerConfig:
        """Return the configuration of an RWKV layer's mixer."""
        return TimeMixerConfig.from_dict((self.mixer or {}) | self.mixer_layers.get(str(layer), {}))


def mixer_fields(configs: dict[int, TimeMixerConfig]) -> dict:
    """Return the fields `mixer` and `mixer_layers` for the mixers of all RWKV layers.

    Args:
        configs: by layer index; {}: a model without RWKV layers.
    """
    if not configs:
        return {"mixer": None, "mixer_layers": {}}
    fields = {i: config.to_dict() for i, config in configs.items()}
    if not fields:
        return {"mixer": None, "mixer_layers": {}}
    mixer = fields[min(fields)]
    differences = {i: {name: v for name, v in values.items() if v != mixer[name]} for i, values in fields.items()}
    return {"mixer": mixer, "mixer_layers": {str(i): values for i, values in differences.items() if values}}


class MixerModel(PreTrainedModel):
    """Mixin over a family's models.

    The initialization of mixers that were not loaded, and what activation checkpointing must not be.
    """

    def _set_gradient_checkpointing(  # type: ignore[override]  # whose options differ between versions
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **kwargs: Any
    ) -> None:
        """Switch activation checkpointing, as all of transformers' own ways to it do in the end.

        Raises:
            ValueError: it is to be reentrant. Reentrant checkpoints differentiate what a layer takes as arguments and
                returns; v_first and k_first pass from the first RWKV layer to the others by another way.
        """
        options = getattr(gradient_checkpointing_func, "keywords", {})
        if enable and options.get("use_reentrant"):
            raise ValueError(
                "use_reentrant=True would cut the gradient between RWKV layers (through v_first): give "
                'gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        function = partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, function, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if not isinstance(module, RWKVAttention) or any(p.is_meta for p in module.parameters()):
            return
        loaded = {name for name, p in module.named_parameters() if getattr(p, "_is_hf_initialized", False)}
        projections = {name for name, _ in module.named_parameters() if "." in name}  # initialized as modules
        missing = [name for name, _ in module.named_parameters() if name not in loaded | projections]
        if missing and loaded - projections:
            raise ValueError(f"weights of RWKV layer {module.layer_idx} are missing: {', '.join(missing)}")
        if missing:
            start = "calibrated" if loaded else "scratch"  # some projections were loaded, or it is a new model
            init_mixer(module, module.layer_idx, self.config.num_hidden_layers, start)


class HybridBackbone(MixerModel):
    """Mixin over a family's `<Family>Model`.

    Replaces the attention of RWKV layers and makes the `ForwardContext`.

    Attributes:
        layers: decoder layers of the family's model.
        kept_attention_class: the family's attention with `KeptAttention`.
    """

    layers: nn.ModuleList
    _keep_in_fp32_modules_strict = FP32_PARAMETERS
    kept_attention_class: type[nn.Module]
    _is_stateful = True  # a recurrent state cannot be rolled back: prompt lookup is refused by transformers
    _can_compile_fullgraph = False  # the cache slots of RWKV layers are replaced at run time

    def __init__(self, config: Any) -> None:  # the family's configuration with `HybridFields`, which no type can say
        super().__init__(config)
        for i, layer in enumerate(self.layers):
            if i in config.rwkv_layers:
                is_first = i == config.rwkv_layers[0]
                layer.self_attn = RWKVAttention(config.mixer_config(i), i, is_first, num_layers=len(self.layers))
            elif not config.attention_rope or config.attention_log_base or is_cut(config, i, config.attention_window):
                layer.self_attn = self.kept_attention_class(config, i)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        forward_context: ForwardContext | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the family's backbone.

        `attention_mask` is (B, past + T); without `position_ids`, positions count its tokens, so that rows padded on
        the left give what they give alone. A `forward_context` replaces the one that is made from the other arguments.
        Without mask and with use_cache=False, `position_ids` that restart inside a row mark packed documents, as they
        do for the attention layers: each document then starts from an empty state.

        Raises:
            ValueError: no tokens, or a prepared 4-D mask without `forward_context`, which does not show padding.
        """
        inputs = inputs_embeds if input_ids is None else input_ids
        if inputs is None:
            raise ValueError("the model needs input_ids or inputs_embeds")
        if forward_context is None:
            batch, tokens = inputs.shape[:2]
            caching = self.config.use_cache if use_cache is None else use_cache
            mask = cu_seqlens = None
            if attention_mask is not None:
                mask = _current_tokens(attention_mask, tokens)
                seen = 0 if past_key_values is None else past_key_values.get_seq_length()
                if position_ids is None and attention_mask.shape[1] == seen + tokens:
                    # mixers that rotate keys see absolute positions: another decay for each channel of a pair
                    position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]
            elif position_ids is not None and past_key_values is None and not caching:
                cu_seqlens = _document_boundaries(position_ids.expand(batch, -1))
            forward_context = ForwardContext(first=VFirstHolder(), mask=mask, cu_seqlens=cu_seqlens)
        if not any(getattr(layer.self_attn, "reads_mask", True) for layer in self.layers):
            # one that is prepared: else transformers makes one of this call's tokens times all before them
            attention_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=inputs.device)
        with attention_of_decoding(inputs.device) if inputs.shape[1] == 1 else nullcontext():
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                forward_context=forward_context,
                **kwargs,
            )


def attention_of_decoding(device: torch.device) -> AbstractContextManager:
    """Return a context in which attention of one token makes no plan for the number of keys.

    On Hopper, PyTorch prefers cuDNN, which plans anew for every length: 37 ms more a token on an H200.
    """
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


class HybridCausalLM(MixerModel):
    """Mixin over a family's `<Family>ForCausalLM`: the same head on a hybrid backbone.

    Attributes:
        backbone_class: the family's model with `HybridBackbone`.
    """

    _is_stateful = True
    _can_compile_fullgraph = False
    backbone_class: type[PreTrainedModel]

    def __init__(self, config: Any) -> None:
        PreTrainedModel.__init__(self, config)  # not the family's, which would build its own backbone first
        self.model = self.backbone_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as every model of transformers does, but not speculatively, nor as the assistant of another model.

        Raises:
            ValueError: an assistant is given, or another model asks as its target, before it has read a token.
        """
        assists = getattr(kwargs.get("generation_config"), "is_assistant", None) or kwargs.get("is_assistant")
        if assists or kwargs.get("assistant_model") is not None:
            role = "be the assistant_model of another model" if assists else "generate with an assistant_model"
            raise ValueError(
                f"{type(self).__name__} cannot {role}: rejected tokens have to be taken back, and a recurrent state "
                "cannot be rolled back. Generate without assistant_model"
            )
        return super().generate(*args, **kwargs)  # type: ignore[misc]  # of GenerationMixin

    def generate_graphed(self, *args: Any, **kwargs: Any) -> Tensor:
        """Generate with each token as one CUDA graph; arguments, result and errors as `generate()`.

        Greedy or sampling, no beams, no streaming, no settings that need the tokens so far; see graphed_decoding.py.
        """
        if kwargs.get("streamer") is not None:
            raise ValueError("graphed generation does not stream: use generate()")
        return self.generate(*args, custom_generate=generate_graphed, **kwargs)


def _current_tokens(attention_mask: Tensor, tokens: int) -> Tensor:
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        shape = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(
            f"RWKV layers need the 2-D padding mask (batch, past + current tokens), got {shape}; static caches, which "
            "prepare 4-D masks, are not supported"
        )
    return attention_mask[:, -tokens:].bool()


def _document_boundaries(position_ids: Tensor) -> Tensor | None:
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not starts[:, 1:].any():
        return None
    ends = torch.tensor([position_ids.numel()], device=position_ids.device)
    return torch.cat([starts.flatten().nonzero().flatten(), ends]).int()
