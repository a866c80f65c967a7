"""The states that the rows of a packed batch begin with and leave, when rows go on from one step to the next.

In the forward of a model they travel in the `ForwardContext`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..modeling.time_mixer import MixerState
from ..modeling.window_attention import WindowState

State = MixerState | WindowState


@dataclass
class CarriedRows:
    """States by layer, of B rows each, in which the first document of a row goes on and the last one ends.

    Attributes:
        before: what the rows begin with; zeros where a row begins anew.
        first, last: indices (B,) of a row's first and last document among all S; None: each row is one document.
        documents: S.
        after: what the rows leave, without gradient; every layer writes its own, once more where its activations are
            recomputed.
    """

    before: Mapping[int, State]
    first: Tensor | None
    last: Tensor | None
    documents: int
    after: dict[int, State] = field(default_factory=dict)

    def of_documents(self, layer: int) -> MixerState:
        """Return what the documents begin with in an RWKV layer: (S, ...), but (B, ...) of a window beside it."""
        state = self.before[layer]
        assert isinstance(state, MixerState)
        if self.first is None:
            return state
        first = self.first

        def spread(x: Tensor) -> Tensor:
            return x.new_zeros(self.documents, *x.shape[1:]).index_copy(0, first.to(x.device), x)

        return _map_but_window(state, spread)

    def of_window(self, layer: int) -> WindowState:
        """Return what the rows begin with in a layer that keeps attention, cut to a window: (B, ...)."""
        state = self.before[layer]
        assert isinstance(state, WindowState)
        return state

    def leave(self, layer: int, state: State) -> None:
        """Keep what a layer returns after its documents."""
        if isinstance(state, MixerState) and self.last is not None:
            last = self.last
            state = _map_but_window(state, lambda x: x[last.to(x.device)])
        self.after[layer] = state.map(Tensor.detach)


def _map_but_window(state: MixerState, change: Callable[[Tensor], Tensor]) -> MixerState:
    return state._replace(wkv=change(state.wkv), shift=None if state.shift is None else change(state.shift))


def stacked(states: Sequence[State]) -> State:
    """Return one state of all the rows of these, which have the same parts."""
    parts = [torch.cat(part) for part in zip(*(state.tensors() for state in states), strict=True)]
    left = iter(parts)
    return states[0].map(lambda _: next(left))
