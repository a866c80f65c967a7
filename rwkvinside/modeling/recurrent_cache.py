"""The recurrent state of a time mixer inside transformers' own cache, so that stock `generate()` needs no change.

`generate()` builds a `DynamicCache` with one key/value slot per layer before the model has run. A recurrent layer
replaces its own slot, in place, the first time it stores something (`write_state`); attention layers keep theirs.
This module holds tensors and their batch bookkeeping; it computes nothing.
"""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, StaticCache

from .time_mixer import MixerState


class RecurrentLayer(CacheLayerMixin):
    """One layer's `MixerState` plus the number of positions it has seen, padding included.

    The length is what makes a cache without any attention layer, or with a recurrent layer 0, answer
    `get_seq_length()`: transformers' own linear-attention layers refuse that question.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False  # a recurrence cannot forget its last tokens; assisted generation is refused by the model
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: MixerState | None = None
        self.seen = 0

    def write(self, state: MixerState, tokens: int) -> None:
        """Replace the state by the one after `tokens` further positions."""
        self.state = state
        self.seen += tokens
        self.is_initialized = True

    def _map_state(self, change) -> None:
        if self.state is not None:
            self.state = MixerState(*(None if part is None else change(part) for part in self.state))

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state = None
        self.seen = 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map_state(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_state(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_state(lambda part: part[indices.to(part.device)])

    def offload(self) -> None:
        """The state is small and constant in size: it stays on its device."""

    def prefetch(self) -> None:
        """Nothing to bring back, see `offload`."""

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise NotImplementedError(
                f"a recurrent state cannot be cropped (asked to remove {tokens_to_remove} tokens)"
            )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("a recurrent layer stores no keys and values")

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a recurrent layer stores no keys and values")


def read_state(cache: Cache | None, layer_idx: int) -> MixerState | None:
    """The state layer `layer_idx` left in `cache`, or None at the start of a sequence or without a cache."""
    if cache is None or layer_idx >= len(cache.layers):
        return None
    slot = cache.layers[layer_idx]
    return slot.state if isinstance(slot, RecurrentLayer) else None


def write_state(cache: Cache, layer_idx: int, state: MixerState, tokens: int) -> None:
    """Store the state after `tokens` further positions, replacing the key/value slot made for this layer.

    Raises:
        TypeError: a static cache, which prepares its masks and shapes for keys and values in every layer.
    """
    if isinstance(cache, StaticCache):
        raise TypeError(
            f"{type(cache).__name__} cannot hold a recurrent state: use the default cache of generate() or "
            "transformers.DynamicCache, without cache_implementation='static'"
        )
    while len(cache.layers) <= layer_idx:
        cache.layers.append(cache.layer_class_to_replicate())
    if not isinstance(cache.layers[layer_idx], RecurrentLayer):
        cache.layers[layer_idx] = RecurrentLayer()
    cache.layers[layer_idx].write(state, tokens)
