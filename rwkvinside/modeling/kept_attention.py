"""The attention of layers that keep it, where a hybrid changes what it sees.

Without positions (`attention_rope` False), with scores that grow with the position (`attention_log_base`), or cut to
the last W tokens of a document and its first S (`attention_window`, `attention_sinks`), which bounds what it keeps of a
sequence as a recurrence does. Projections, norms, scales and soft caps stay the family's own: its forward runs, with
another attention function at its end. A layer that slides within W tokens anyway is not cut. This file travels with
exported models.
"""

import math
from collections.abc import Callable
from copy import copy
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .first_layer import ForwardContext
from .recurrent_cache import can_overwrite, read_state, write_state
from .rwkv_attention import identity_rotation
from .window_attention import Form, WindowState, window_attention

IMPLEMENTATION = __name__  # an export that is loaded next to others finds its own function


def own_window(config: PretrainedConfig, layer: int) -> int | None:
    """Return how many tokens the family's attention of a layer sees, a token itself included; None: all before it."""
    layer_types = getattr(config, "layer_types", None)
    slides = layer_types is None or layer_types[layer] == "sliding_attention"
    return getattr(config, "sliding_window", None) if slides else None


def is_cut(config: PretrainedConfig, layer: int, window: int) -> bool:
    """Return whether a layer that keeps attention sees less when it is cut to a window; 0 is no window."""
    own = own_window(config, layer)
    return bool(window) and (own is None or own > window)


def grown(query: Tensor, positions: Tensor, base: float) -> Tensor:
    """Return queries whose scores grow with the position t in the document, as log_a(t + a); HALO (arXiv 2601.22156).

    Args:
        query: (B, H, T, N).
        positions: (B or 1, T), from 0 on, where the factor is 1.
        base: a > 1.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    factor = torch.log(positions.to(query.device, wide) + base) / math.log(base)
    return query * factor.to(query.dtype)[:, None, :, None]


class KeptAttention(nn.Module):
    """Mixin over a family's attention, for a configuration with `HybridFields`.

    Attributes:
        window, sinks: tokens that it is cut to; 0 and 0: it is not.
        log_base: see `grown`; None: scores are as they are.
    """

    layer_idx: Any  # of the family's attention, which says that it is a number or None

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        cut = is_cut(config, layer_idx, config.attention_window)
        self.window: int = config.attention_window if cut else 0
        self.sinks: int = config.attention_sinks if cut else 0
        self.rotates, self.log_base = config.attention_rope, config.attention_log_base
        self.reads_mask = not cut  # see `HybridBackbone.forward`
        self.model_config = config
        if cut or self.log_base:  # the family's forward looks its attention function up in its configuration
            self.config: Any = copy(config)
            self.config._attn_implementation = IMPLEMENTATION

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return what the family's attention returns, for a rotation by 0, or of the window's tokens."""
        if not self.rotates:
            position_embeddings = identity_rotation(position_embeddings)
        if self.window:  # keys and values go into a ring, not where the family's forward would put them
            kwargs |= {"past_key_values": None, "ring": kwargs.get("past_key_values")}
        return super().forward(hidden_states, position_embeddings, *args, **kwargs)


def attend(
    module: KeptAttention, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attend with scores that may grow, to a window or to all; in transformers' convention for attention functions.

    Args:
        module: the attention.
        query: (B, H, T, N).
        key, value: (B, G, T, N), in a window of the tokens of this call, else of all.
        attention_mask: not read in a window: padding and documents are in `forward_context`.
        kwargs: of the family's own attention function; `position_ids` (B or 1, T) is read where scores grow.

    Returns:
        (output (B, T, H, N), attention weights or None).

    Raises:
        ValueError: see `_attend_to_window`.
    """
    if module.log_base:
        query = grown(query, kwargs["position_ids"], module.log_base)
    if module.window:
        return _attend_to_window(module, query, key, value, **kwargs), None
    return _of_the_family(module)(module, query, key, value, attention_mask, **kwargs)


def _attend_to_window(
    module: KeptAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    ring: Cache | None = None,
    forward_context: ForwardContext | None = None,
    **kwargs: Any,
) -> Tensor:
    """Return (B, T, H, N).

    Args:
        module, query, key, value: as of `attend`.
        dropout: must be 0.
        scaling: of the scores; None is 1 / sqrt(N).
        softcap: see `window_attention`.
        ring: cache with the state of the tokens before, which takes the new one.
        forward_context: of the model's forward.
        kwargs: for other attention functions.

    Raises:
        ValueError: a dropout, or no `forward_context`.
    """
    if dropout:
        raise ValueError(f"attention_dropout {dropout} is not computed in a window: set it to 0")
    if forward_context is None:
        raise ValueError("attention within a window needs forward_context, which hybrid models hand to their layers")
    if scaling is not None:
        query = query * (scaling * query.shape[-1] ** 0.5)
    before = read_state(ring, module.layer_idx)
    assert before is None or isinstance(before, WindowState)
    mask, bounds = forward_context.mask, forward_context.cu_seqlens
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    attended, state = window_attention(
        q,
        k,
        v,
        Form(module.window, module.sinks, softcap),
        state=before,
        mask=None if mask is None else mask.to(query.device),
        cu_seqlens=None if bounds is None else bounds.to(query.device),
        inplace=before is not None and can_overwrite(before),
        keep_state=ring is not None,
    )
    if ring is not None and state is not None:
        write_state(ring, module.layer_idx, state, tokens=query.shape[2])
    return attended.values


def _of_the_family(module: KeptAttention) -> Callable:
    """Return the attention function that the family's attention would call in this model."""
    families = (cls.__module__ for cls in type(module).__mro__ if cls.__module__.startswith("transformers.models."))
    eager = import_module(next(families)).eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(module.model_config._attn_implementation, eager)


AttentionInterface.register(IMPLEMENTATION, attend)
