"""Several mixers in one layer, weighed by what training finds, or by TMD codes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import Mixer, Shared, State


class Mixture(Mixer):
    """The weighted sum of mixers, `mamba2|attention` in a pattern.

    The weights are a softmax of one learned number for each mixer, at first nearly all of it the first one's: training
    moves to the others where they help ("adaptive layer selection", "progressive replacement"). With codes these move
    the numbers, too ("TMD-routed attention"). State: those of the mixers, one after the other.

    Args:
        mixers: of the same width, none of them standalone.
        d_model: their width.
        d_tmd: width of the codes; 0: none.
    """

    kind = "mixture"
    FIRST = 3.0  # softmax(3, 0): 95 %

    def __init__(self, mixers: Sequence[Mixer], d_model: int, d_tmd: int = 0):
        super().__init__()
        if any(mixer.standalone for mixer in mixers):
            raise ValueError(f"{', '.join(mixer.kind for mixer in mixers)}: one is a whole stack, use it alone")
        self.mixers = nn.ModuleList(mixers)
        self.causal = all(mixer.causal for mixer in mixers)
        self.recurrent = all(mixer.recurrent for mixer in mixers)
        self.scores = nn.Parameter(torch.tensor([self.FIRST] + [0.0] * (len(mixers) - 1)))
        self.tmd_route = nn.Linear(d_tmd, len(mixers), bias=False) if d_tmd else None
        if self.tmd_route is not None:
            nn.init.zeros_(self.tmd_route.weight)
        with torch.no_grad():  # how many tensors each mixer's state has
            states = [mixer(torch.zeros(1, 1, d_model), shared=Shared())[1] for mixer in mixers]
        self._parts = [len(state or ()) for state in states]

    def weights(self, tmd: Tensor | None = None) -> Tensor:
        """Return the weights of the mixers, (n,), or (B, n) for codes (B, 16)."""
        scores = self.scores
        if self.tmd_route is not None and tmd is not None:
            scores = scores + self.tmd_route(tmd.to(scores.dtype))
        return scores.softmax(-1)

    def forward(
        self, x: Tensor, state: State | None = None, *, mask: Tensor | None = None, shared: Shared | None = None
    ) -> tuple[Tensor, State | None]:
        """Mix a batch of rows, see `Mixer.forward`."""
        if state is not None and not self.causal:
            raise ValueError(f"{self.kind} looks ahead, so it cannot go on from a state: give it the whole context")
        shared = shared or Shared()
        weights = self.weights(shared.tmd)
        outputs, after, at = [], [], 0
        for i, (mixer, parts) in enumerate(zip(self.mixers, self._parts, strict=True)):
            y, end = mixer(x, None if state is None else state[at : at + parts], mask=mask, shared=shared)
            weight = weights[..., i].to(y.dtype)
            outputs.append(y * (weight[:, None, None] if weight.dim() else weight))
            after += end or ()
            at += parts
        return torch.stack(outputs).sum(0), tuple(after) if self.causal else None
