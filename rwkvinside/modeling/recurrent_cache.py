"""The state of a time mixer, or of an attention within a window, inside transformers' own cache.

So stock `generate()` needs no change. It builds a `DynamicCache` with one key/value slot per layer before the model has
run. A layer with a state of constant size replaces its own slot, in place, the first time it stores something
(`write_state`); other attention layers keep theirs. This module holds tensors and their batch bookkeeping; it computes
nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, StaticCache

from .time_mixer import MixerState
from .window_attention import WindowState

State = MixerState | WindowState


class RecurrentLayer(CacheLayerMixin):
    """One layer's state and the number of positions it has seen.

    Positions include padding. Their number is what makes a cache without any attention layer, or with a recurrent layer
    0, answer `get_seq_length()`: transformers' own linear-attention layers refuse that question.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False  # a recurrence cannot forget its last tokens; the model refuses assisted generation
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: State | None = None
        self.seen = 0

    def write(self, state: State, tokens: int) -> None:
        """Take the state after `tokens` further positions.

        Where it can, it goes into the memory of the previous one, which a captured CUDA graph reads again.
        """
        if self.state is None or not can_overwrite(self.state):
            self.state = state
        else:
            for kept, new in zip(self.state.tensors(), state.tensors(), strict=True):
                if kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)
        self.seen += tokens
        self.is_initialized = True

    def _map_state(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            self.state = self.state.map(change)

    def get_seq_length(self) -> int:
        """Return the number of positions seen."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the keys that an attention layer would have."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.state = None
        self.seen = 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Give each row the state of the row `beam_idx` names."""
        self._map_state(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._map_state(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only."""
        self._map_state(lambda part: part[indices.to(part.device)])

    def offload(self) -> None:
        """Do nothing: the state is small and constant in size, it stays on its device."""

    def prefetch(self) -> None:
        """Do nothing, see `offload`."""

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to forget tokens.

        Raises:
            NotImplementedError: any number of tokens but 0.
        """
        if tokens_to_remove != 0:
            raise NotImplementedError(
                f"a recurrent state cannot be cropped (asked to remove {tokens_to_remove} tokens)"
            )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Refuse keys and values (NotImplementedError)."""
        raise NotImplementedError("a recurrent layer stores no keys and values")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse keys and values (NotImplementedError)."""
        raise NotImplementedError("a recurrent layer stores no keys and values")


def is_recurrent(slot: Any) -> bool:
    """Return whether a slot of a cache is a `RecurrentLayer`, be it of an export, which carries a class of its own."""
    return type(slot).__name__ == RecurrentLayer.__name__


def can_overwrite(state: State) -> bool:
    """Return whether the memory of a state may take another one.

    Not while gradients may need it, nor outside of the inference mode that it is from.
    """
    return not torch.is_grad_enabled() and (torch.is_inference_mode_enabled() or not state.tensors()[0].is_inference())


def read_state(cache: Cache | None, layer_idx: int) -> State | None:
    """Return the state that a layer left in the cache.

    None at the start of a sequence or without a cache.
    """
    if cache is None or layer_idx >= len(cache.layers):
        return None
    slot = cache.layers[layer_idx]
    return slot.state if isinstance(slot, RecurrentLayer) else None


def write_state(cache: Cache, layer_idx: int, state: State, tokens: int) -> None:
    """Store the state after `tokens` further positions in the slot of a layer.

    The key/value slot that was made for this layer is replaced.

    Raises:
        TypeError: a static cache, which prepares its masks and shapes for keys and values in every layer, or one of
            fewer layers that cannot grow.
    """
    if isinstance(cache, StaticCache):
        raise TypeError(
            f"{type(cache).__name__} cannot hold a recurrent state: use the default cache of generate() or "
            "transformers.DynamicCache, without cache_implementation='static'"
        )
    while len(cache.layers) <= layer_idx:
        if cache.layer_class_to_replicate is None:
            raise TypeError(f"the cache has {len(cache.layers)} layers and cannot grow to layer {layer_idx}")
        cache.layers.append(cache.layer_class_to_replicate())
    slot = cache.layers[layer_idx]
    if not isinstance(slot, RecurrentLayer):
        slot = cache.layers[layer_idx] = RecurrentLayer()
    slot.write(state, tokens)
