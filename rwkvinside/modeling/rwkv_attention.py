"""The time mixer in Hugging Face's attention call convention.

Used as `layer.self_attn` in exported models and as the student next to the teacher's attention in training. What
crosses layers (v_first, k_first, padding, document boundaries) arrives in one `ForwardContext` made for each forward of
the model.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .first_layer import FirstLayerKV, ForwardContext
from .mixer_presets import TimeMixerConfig
from .recurrent_cache import can_overwrite, read_state, write_state
from .time_mixer import MixerState, TimeMixer


class RWKVAttention(TimeMixer):
    """A `TimeMixer` that decoder layers of transformers can call as their attention.

    Args:
        config: the mixer's configuration.
        layer_idx: index of the decoder layer, its slot in the cache.
        is_first: whether this is the first RWKV layer of the model, which provides v_first and k_first.
        num_layers: of the model.
        init, shift_ratio: see `init_mixer`.

    Attributes:
        reads_mask: False: no mask of queries and keys needs to be made for this layer.
    """

    reads_mask = False

    def __init__(
        self,
        config: TimeMixerConfig,
        layer_idx: int,
        is_first: bool,
        num_layers: int,
        init: str = "calibrated",
        shift_ratio: float = 1.0,
    ) -> None:
        super().__init__(config, is_first, layer=layer_idx, num_layers=num_layers, init=init, shift_ratio=shift_ratio)
        self.layer_idx = layer_idx

    def forward(  # type: ignore[override]  # a mixer that is called as an attention
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        forward_context: ForwardContext | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Mix (B, T, D) over time.

        Continues from the state in `past_key_values`, or in `forward_context.carried`, and leaves the new one there.
        `attention_mask` is the attention layers' (B, 1, Q, K) mask and is not read: padding is `forward_context.mask`,
        (B, T) for the current tokens only. Keyword arguments meant for other attention implementations are ignored.

        Returns:
            (output (B, T, D), None): a recurrence has no attention weights.

        Raises:
            ValueError: no `forward_context`: the layer was called by a model that does not know RWKV layers.
        """
        if forward_context is None:
            raise ValueError(
                "an RWKV layer needs forward_context=ForwardContext(...), one per forward of the whole model"
            )
        first = None
        if not self.is_first:
            v, k = forward_context.first.read()
            first = FirstLayerKV(v.to(hidden_states.device), _to(k, hidden_states))
        carried = forward_context.carried
        layer = self.layer_idx
        before = read_state(past_key_values, layer) if carried is None else carried.of_documents(layer)
        assert before is None or isinstance(before, MixerState)
        output, first, state = super().forward(
            hidden_states,
            first=first,
            state=before,
            rope=position_embeddings,
            mask=_to(forward_context.mask, hidden_states),
            cu_seqlens=_to(forward_context.cu_seqlens, hidden_states),
            inplace=carried is None and before is not None and can_overwrite(before),  # the cache's is replaced below
            keep_state=carried is not None or past_key_values is not None,
            recompute=forward_context.recompute == "recurrence",
        )
        if self.is_first:
            forward_context.first.write(first)
        if carried is not None:
            carried.leave(layer, state)
        if past_key_values is not None:
            write_state(past_key_values, layer, state, tokens=hidden_states.shape[1])
        return output, None


def _to(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    # layers may be spread over devices, and what moves a layer's inputs to its device misses these
    return None if tensor is None else tensor.to(like.device)


def identity_rotation(position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return (cos, sin) of the same shapes that rotate nothing."""
    cos, sin = position_embeddings
    return torch.ones_like(cos), torch.zeros_like(sin)
