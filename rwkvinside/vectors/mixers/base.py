"""What every mixer promises: chunks equal the whole, no look ahead, exact padding, a state that can be reordered.

Padding is handled once, here: the real tokens of each row are moved to its front, so a mixer only has to know how many
of them count (`lengths`), and its outputs are moved back. Since nothing looks ahead, what lies behind them is harmless
for all but the state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...modeling.first_layer import FirstLayerKV

State = tuple[Tensor, ...]  # batch first; floating-point ones are fp32 (fp64 for fp64 inputs)


@dataclass
class Shared:
    """What crosses layers within one forward.

    Attributes:
        first: value and key of the first RWKV-7 layer, written by it.
        tmd: (B, 16) codes that modulate a mixer, see `tmd`; None without.
    """

    first: FirstLayerKV | None = None
    tmd: Tensor | None = None


@dataclass(frozen=True)
class Place:
    """Where a mixer is: which layer of how many, and whether it is the first of its kind."""

    layer: int = 0
    layers: int = 1
    first: bool = True


class Mixer(nn.Module):
    """Mixes a sequence of vectors (B, T, D) over time.

    Attributes:
        kind: its name in the registry.
        causal: no output depends on later inputs. Others predict from the last position only and have no state.
        recurrent: the state's size does not depend on the number of tokens.
        standalone: a whole stack with norms and feed-forward layers of its own.
        takes_codes: it has an option d_tmd, the width of the codes in `Shared.tmd`.
        dynamics: ends of the names of parameters that want a smaller learning rate and no weight decay.
    """

    kind: ClassVar[str]
    causal: bool = True
    recurrent: bool = True
    standalone: ClassVar[bool] = False
    takes_codes: ClassVar[bool] = False
    dynamics: ClassVar[tuple[str, ...]] = ()

    def forward(
        self, x: Tensor, state: State | None = None, *, mask: Tensor | None = None, shared: Shared | None = None
    ) -> tuple[Tensor, State | None]:
        """Mix a batch of rows.

        Args:
            x: (B, T, D).
            state: what earlier tokens left; None at the start.
            mask: (B, T) bool, True = real token; padding anywhere leaves the state as it is, its outputs are 0.
            shared: of this forward.

        Returns:
            y (B, T, D), and the state after the last real token (None of a mixer that is not causal).

        Raises:
            ValueError: a state for a mixer that is not causal, or a sequence longer than it was made for.
        """
        if state is not None and not self.causal:
            raise ValueError(f"{self.kind} looks ahead, so it cannot go on from a state: give it the whole context")
        shared = shared or Shared()
        if mask is None:
            return self.mix(x, state, None, shared)
        order, lengths = front(mask)
        y, state = self.mix(take(x, order), state, lengths, shared)
        return take(y, order.argsort(1)) * mask[..., None].to(y.dtype), state

    def mix(
        self, x: Tensor, state: State | None, lengths: Tensor | None, shared: Shared
    ) -> tuple[Tensor, State | None]:
        """Mix rows whose first `lengths` tokens (B,) count; None: all. Otherwise as `forward`."""
        raise NotImplementedError


class HistoryMixer(Mixer):
    """A mixer without a recurrent form: its state is all earlier inputs, over which it runs again.

    State: history (B, P, D), and how many of them count in each row (B,).
    """

    recurrent = False

    def run(self, x: Tensor) -> Tensor:
        """Mix whole rows (B, T, D), without looking ahead."""
        raise NotImplementedError

    def mix(self, x: Tensor, state: State | None, lengths: Tensor | None, shared: Shared) -> tuple[Tensor, State]:
        """Run over history and new tokens, and return the outputs of the latter."""
        B, T, _ = x.shape
        counted = x.new_full((B,), T, dtype=torch.long) if lengths is None else lengths
        if state is None:
            return self.run(x), (fp32(x), counted)
        history, before = state
        mask = torch.cat([real(before, history.shape[1]), real(counted, T)], 1)
        order, total = front(mask)
        whole = take(torch.cat([history.to(x.dtype), x], 1), order)
        at = (before[:, None] + torch.arange(T, device=x.device)).clamp(max=whole.shape[1] - 1)
        return take(self.run(whole), at), (fp32(whole), total)


def front(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the order (B, T) that moves real tokens to the front of their rows, and how many there are (B,)."""
    return (~mask).to(torch.uint8).argsort(dim=1, stable=True), mask.sum(1)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Return x (B, T, ...) at positions (B, S)."""
    view = index.view(*index.shape, *(1 for _ in x.shape[2:]))
    return x.gather(1, view.expand(*index.shape, *x.shape[2:]))


def real(lengths: Tensor, T: int) -> Tensor:
    """Return the mask (B, T) of rows whose first tokens are real."""
    return torch.arange(T, device=lengths.device) < lengths[:, None]


def fp32(x: Tensor) -> Tensor:
    """Return x in fp32, or as it is in fp64."""
    return x if x.dtype == torch.float64 else x.float()


def add_lengths(count: Tensor | None, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the positions (B, T) of new tokens and the number (B,) of all tokens so far."""
    B, T, _ = x.shape
    start = torch.zeros(B, dtype=torch.long, device=x.device) if count is None else count
    return start[:, None] + torch.arange(T, device=x.device), start + (T if lengths is None else lengths)


def check_heads(d_model: int, heads: int) -> int:
    """Return the width of a head.

    Raises:
        ValueError: heads do not divide the width.
    """
    if heads < 1 or d_model % heads:
        raise ValueError(f"heads={heads} does not divide d_model={d_model}")
    return d_model // heads
