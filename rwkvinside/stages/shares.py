"""How much of its calibration every layer of a windowed student keeps.

Calibration fits one layer after the other, each by least squares, and does not see what later layers make of what a fit
leaves over. In a deep model the fitted layers together can be worse than their windows alone, which is the student's
control. So what calibration has changed is scaled, in a few groups of layers, by the share with which the student is
closest to its teacher on rows that were not fitted. With no share left the student is its control.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from ..data.batch import Batch
from ..hybrid.calibration import Calibrated
from ..hybrid.model import HybridModel
from ..losses.distillation import DistillationLoss
from ..teacher.signals import SelfTeacher

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
GROUPS = 4  # of neighboring layers, each with a share of its own
HELD_PART = 4  # of so many rows one is held out
HELD_TOKENS = 4096  # are enough to tell shares apart


def split_rows(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Return the rows to fit, and the last ones, to choose shares on.

    A single row is both. A last row that is mostly padding is left out: it says nothing about long documents.
    """
    batches = _without_padding(batches)
    rows = sum(len(batch.rows) for batch in batches)
    if rows == 1:
        return list(batches), list(batches)
    remaining = rows - held_rows(rows, batches[0].input_ids.shape[1])
    fitted, held = [], []
    for batch in batches:
        count = len(batch.rows)
        cut = min(remaining, count)
        remaining -= cut
        fitted += [_rows(batch, slice(0, cut))] if cut else []
        held += [_rows(batch, slice(cut, count))] if cut < count else []
    return fitted, held


def _without_padding(batches: Sequence[Batch]) -> list[Batch]:
    *others, last = batches
    if int(last.mask[-1].sum()) * 2 >= last.mask.shape[1] or len(last.rows) + len(others) == 1:
        return list(batches)
    return others + ([_rows(last, slice(0, -1))] if len(last.rows) > 1 else [])


def held_rows(rows: int, width: int) -> int:
    """Return how many of so many rows are held out; 0 of a single one."""
    return max(1, min(rows // HELD_PART, HELD_TOKENS // width)) if rows > 1 else 0


def most_trials(layers: int) -> int:
    """Return how many students `choose_shares` compares at most."""
    return len(SHARES) + 2 * min(GROUPS, layers)


def _rows(batch: Batch, rows: slice) -> Batch:
    names = ("input_ids", "labels", "position_ids", "segment_ids", "rows")
    return replace(batch, **{name: getattr(batch, name)[rows] for name in names})


@torch.no_grad()
def choose_shares(
    model: HybridModel,
    layers: Mapping[int, Calibrated],
    batches: Sequence[Batch],
    advance: Callable[[], object] = lambda: None,
) -> dict[int, float]:
    """Give every layer the share of its fit with which the student is closest to its teacher.

    First the best one for all layers, then, from the last layers on, the best one for each of a few groups.

    Args:
        model: calibrated, with its teacher's attention.
        layers: those with a window.
        batches: of rows that were not fitted.
        advance: called after every student that is compared, `most_trials` times at most.

    Returns:
        The shares by layer.
    """
    judged = [(batch, SelfTeacher().signal(model, batch)) for batch in batches]
    every = sorted(layers)
    measured: dict[tuple[float, ...], float] = {}

    def keep(shares: Mapping[int, float]) -> None:
        for i, share in shares.items():
            layers[i].keep(share)

    def divergence(shares: Mapping[int, float]) -> float:
        key = tuple(shares[i] for i in every)
        if key not in measured:
            keep(shares)
            measured[key] = sum(float(model(batch, task=DistillationLoss(signal))[0]) for batch, signal in judged)
            advance()
        return measured[key]

    def best(chosen: dict[int, float], group: Sequence[int], shares: Sequence[float]) -> dict[int, float]:
        return min((chosen | dict.fromkeys(group, share) for share in shares), key=divergence)

    chosen = best({}, every, SHARES)
    size = -(-len(every) // GROUPS)
    for first in reversed(range(0, len(every), size)):
        group = every[first : first + size]
        at = SHARES.index(chosen[group[0]])
        chosen = best(chosen, group, SHARES[max(0, at - 1) : at + 2])
    keep(chosen)
    return chosen
