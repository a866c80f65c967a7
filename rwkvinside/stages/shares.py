"""How much of its calibration every layer of a windowed student keeps.

Calibration fits one layer after the other, each by least squares, and does not see what later layers make of what a fit
leaves over. In a deep model the fitted layers together can be worse than their windows alone, which is the student's
control. So what calibration changed is scaled, in a few groups of layers, by the share of it with which the student is
closest to its teacher on text that was not fitted. With no share left the student is its control.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.batch import Batch
from ..hybrid.model import HybridModel
from ..losses.chunked import TeacherSignal
from ..losses.distillation import DistillationLoss
from ..modeling.rwkv_attention import RWKVAttention
from ..teacher.signals import SelfTeacher

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
GROUPS = 4  # of neighboring layers, each with a share of its own
HELD_SHARE = 4  # one row of so many is held out, tokens beyond the following number never
HELD_TOKENS = 4096


def split_rows(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Return the rows to fit and those to choose shares on, as batches; the same where there is but one row."""
    rows = sum(len(batch.rows) for batch in batches)
    width = batches[0].input_ids.shape[1]
    held = min(max(1, rows // HELD_SHARE), max(1, HELD_TOKENS // width))
    if rows == 1:
        return list(batches), list(batches)
    fitted, rest = [], []
    last = rows - held
    for batch in batches:
        count = len(batch.rows)
        cut = min(max(last, 0), count)
        fitted += [batch.select(range(cut))] if cut else []
        rest += [batch.select(range(cut, count))] if cut < count else []
        last -= count
    return fitted, rest


@dataclass(frozen=True)
class Calibrated:
    """The tensors of a layer that shares are of: as the control has them, and as they were fitted."""

    mixer: RWKVAttention
    projection: Tensor
    fitted: tuple[Tensor, Tensor, Tensor]

    @classmethod
    def of(cls, mixer: RWKVAttention, projection: Tensor) -> Calibrated:
        """Return those of a fitted mixer, whose output projection was `projection` before."""
        tensors = (mixer.mix_recurrence, mixer.mix_window, mixer.output.weight)
        return cls(mixer, projection, tuple(x.detach().clone() for x in tensors))

    @torch.no_grad()
    def keep(self, share: float) -> None:
        """Give the mixer this share of what was fitted."""
        recurrence, window, projection = self.fitted
        self.mixer.mix_recurrence.copy_(share * recurrence)
        self.mixer.mix_window.copy_(1 + share * (window - 1))
        self.mixer.output.weight.copy_(self.projection + share * (projection - self.projection))


@torch.no_grad()
def choose_shares(model: HybridModel, layers: dict[int, Calibrated], batches: Sequence[Batch]) -> dict[int, float]:
    """Give every layer the share of its calibration that is best on some batches.

    First one for all layers, then one for each of a few groups of them, from the last on.

    Args:
        model: calibrated, with its teacher's attention.
        layers: those with a window.
        batches: not fitted.

    Returns:
        The shares by layer.
    """
    judged = [(batch, SelfTeacher().signal(model, batch)) for batch in batches]
    shares = dict.fromkeys(layers, 1.0)

    def divergence(changes: dict[int, float]) -> float:
        for i, share in changes.items():
            layers[i].keep(share)
        return sum(_divergence(model, batch, signal) for batch, signal in judged)

    least, best = min((divergence(dict.fromkeys(layers, share)), share) for share in SHARES)
    shares = dict.fromkeys(layers, best)
    divergence(shares)
    for group in _groups(sorted(layers)):
        for share in _neighbors(best):
            found = divergence(dict.fromkeys(group, share))
            if found < least:
                least = found
                shares |= dict.fromkeys(group, share)
        divergence({i: shares[i] for i in group})
    return shares
