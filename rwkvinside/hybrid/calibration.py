"""The start of a mixer from the teacher's own attention, without training.

It is computed layer by layer and in closed form, with no constant to tune.

What copying the projections leaves open, and this fits on a few thousand tokens:
- how fast each head forgets and how strongly it overwrites (decay w0 and in-context rate a0, one value per head), by a
  search over half-lives and rates that minimizes the squared error to the teacher head's output;
- the scale of each head's output and the weight of the current token (bonus r_k), by least squares for every candidate
  of that search, because an unnormalized sum replaces a weighted mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from ..modeling.first_layer import FirstLayerKV
from ..modeling.time_mixer import DECAY_SCALE, ProjectedInputs, TimeMixer, times_shared
from .layerwise_teacher import AttentionActivations, LayerwiseTeacher
from .model import HybridModel

# Candidates: half-lives in tokens from the fastest representable decay on, rates as the mixer's sigmoid gives them.
HALF_LIVES = tuple(2**e for e in (0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12))
RATES = (0.0005, 0.01, 0.05, 0.15, 0.3, 0.5, 0.7, 0.9)
ROUNDS = 2  # decay, rate, then both again with the other one's value


@dataclass(frozen=True)
class LayerFit:
    """What was fitted in one layer; lists are per head.

    Attributes:
        error: squared error to the teacher heads' outputs relative to their squared norm, after the fit.
        error_before: the same with the initial decay and rate and the best output scale.
        half_life: tokens after which a head's state has lost half.
        rate: in-context learning rate.
        scale: factor of the head's output.
        bonus: weight of the current token.
    """

    error: float
    error_before: float
    half_life: list[float]
    rate: list[float]
    scale: list[float]
    bonus: list[float]


@torch.no_grad()
def calibrate(
    model: HybridModel, batches: list[Batch], progress: Callable[[int], None] | None = None
) -> dict[int, LayerFit]:
    """Fit decay, rate, bonus and output scale of every mixer to the teacher, in place.

    Args:
        model: with its teacher attention and freshly initialized mixers.
        batches: a few thousand tokens; the whole set's activations of one layer are held at a time.
        progress: called with the layer index after each layer.

    Returns:
        What was fitted, by layer.
    """
    fits: dict[int, LayerFit] = {}
    firsts: list[FirstLayerKV | None] = [None] * len(batches)
    teacher, mixers = LayerwiseTeacher(model, batches), model.mixers
    for i in range(model.lm.config.num_hidden_layers):
        activations = teacher.run(i)
        if i in mixers:
            inputs = [_Input(*fields) for fields in zip(activations, batches, firsts, strict=True)]
            firsts, fits[i] = _fit(mixers[i], inputs)
            del inputs
        del activations  # before the next layer's are made
        if progress is not None:
            progress(i)
    return fits


@torch.no_grad()
def teacher_norms(model: nn.Module, batches: list[Batch]) -> tuple[dict[int, float], dict[int, float]]:
    """Measure the teacher's attention outputs and the student's error in them.

    Returns:
        Per converted layer, over all tokens of the batches: the mean squared norm of the teacher's attention output
        (the weight of the alignment loss), and the student's squared error relative to it (outputs of zeros get 1).
    """
    sums: dict[int, list[float]] = {}
    for batch in batches:
        for i, (error, norm) in model(batch, mode="align").items():
            total = sums.setdefault(i, [0.0, 0.0])
            total[0] += float(error)
            total[1] += float(norm)
    tokens = sum(batch.num_tokens for batch in batches)
    return {i: norm / tokens for i, (_, norm) in sums.items()}, {i: error / norm for i, (error, norm) in sums.items()}


class _Input(NamedTuple):
    """One batch in a layer.

    Attributes:
        activations: what the layer's attention did with it.
        batch: the batch.
        first: what the first RWKV layer gave; None: it is this one.
    """

    activations: AttentionActivations
    batch: Batch
    first: FirstLayerKV | None


def _fit(mixer: TimeMixer, inputs: list[_Input]) -> tuple[list[FirstLayerKV], LayerFit]:
    c = mixer.mixer_config
    H, N = c.num_heads, c.head_size
    if c.bonus:
        mixer.r_k.zero_()  # the recurrence alone; the bonus is a separate term of the regression
    half_lives = torch.tensor([h for h in HALF_LIVES if math.log(2) / h < DECAY_SCALE])
    candidates = {
        "w0": torch.logit(math.log(2) / half_lives / DECAY_SCALE),
        "a0": torch.logit(torch.tensor(RATES)),
    }

    ((_, error_before),) = _regress(mixer, inputs)
    error = error_before
    for _ in range(ROUNDS):
        for name, values in candidates.items():
            best = getattr(mixer, name).view(H, N).clone()
            for value, (_, candidate) in zip(values, _regress(mixer, inputs, name, values), strict=True):
                best[candidate < error] = float(value)
                error = torch.minimum(error, candidate)
            getattr(mixer, name).copy_(best.view_as(getattr(mixer, name)))
    ((weights, error),) = _regress(mixer, inputs)

    scale = weights[:, 0]
    # folded into the output projection: the gate and the copied value stay what they are
    mixer.output.weight.view(-1, H, N).mul_(scale.to(mixer.output.weight)[:, None])
    # a head whose values are all zero has nothing to fit: its scale is 0 and any bonus is right
    bonus = (weights[:, 1] / scale).nan_to_num(0, 0, 0) if c.bonus else torch.zeros_like(scale)
    if c.bonus:
        mixer.r_k.copy_(bonus[:, None].expand(H, N))
    fit = LayerFit(
        error=float(error.mean()),
        error_before=float(error_before.mean()),
        half_life=(math.log(2) / (DECAY_SCALE * torch.sigmoid(mixer.w0.view(H, N)).mean(-1))).tolist(),
        rate=torch.sigmoid(mixer.a0.view(H, N)).mean(-1).tolist(),
        scale=scale.tolist(),
        bonus=bonus.tolist(),
    )
    return [_project(mixer, layer_input)[1] for layer_input in inputs], fit


def _project(mixer: TimeMixer, layer_input: _Input) -> tuple[ProjectedInputs, FirstLayerKV]:
    activations, batch, first = layer_input
    return mixer.project_inputs(
        activations.x, first=first, rope=activations.rope, cu_seqlens=batch.documents.cu_seqlens
    )[:2]


def _regress(
    mixer: TimeMixer,
    inputs: list[_Input],
    name: str | None = None,
    values: Sequence[float] = (math.nan,),
) -> list[tuple[Tensor, Tensor]]:
    """Fit the teacher heads by [recurrence, bonus], in least squares.

    Args:
        mixer: the layer's.
        inputs: the layer's batches.
        name: a parameter to try values of, which is left at the last one; None: fit once, with the mixer as it is.
        values: of the parameter; they share what does not depend on them.

    Returns:
        For each value the weights (H, 1 or 2) and the relative squared error (H,).
    """
    c = mixer.mixer_config
    sums = [_Sums() for _ in values]
    for layer_input in inputs:
        projected, _ = _project(mixer, layer_input)
        batch = layer_input.batch
        target = layer_input.activations.heads.unflatten(-1, (c.num_heads, c.head_size)).float()
        for value, total in zip(values, sums, strict=True):
            if name is not None:
                getattr(mixer, name).fill_(float(value))
            s = mixer.recurrence_inputs(projected)
            y, _ = mixer.run_recurrence(s, None, None, batch.documents.cu_seqlens)
            terms = [y * s.gate]
            if c.bonus:
                terms.append(times_shared((s.r * s.k).sum(-1, keepdim=True), s.v) * s.gate)
            total.add([term.float() for term in terms], target, batch.mask)
    return [total.solve() for total in sums]


class _Sums:
    """Normal equations of every head, summed over tokens in fp64."""

    def __init__(self):
        self.gram = self.moment = self.target_norm = 0

    def add(self, terms: list[Tensor], target: Tensor, mask: Tensor) -> None:
        """Add terms that should sum to the target, (B, T, H, N) each.

        Args:
            terms: of the regression.
            target: outputs of the teacher's heads.
            mask: (B, T), False where tokens do not count.
        """

        def dot(x: Tensor, y: Tensor) -> Tensor:
            return ((x * y).sum(-1).double() * mask[..., None]).sum((0, 1))

        self.gram = self.gram + torch.stack([torch.stack([dot(x, y) for y in terms], -1) for x in terms], -1)
        self.moment = self.moment + torch.stack([dot(x, target) for x in terms], -1)
        self.target_norm = self.target_norm + dot(target, target)

    def solve(self) -> tuple[Tensor, Tensor]:
        """Return weights (H, terms) and relative squared errors (H,)."""
        smallest = torch.finfo(torch.float64).tiny  # keeps a head without any output solvable
        ridge = smallest + 1e-9 * self.gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        ridge = ridge * torch.eye(self.gram.shape[-1]).to(self.gram)
        weights = torch.linalg.solve(self.gram + ridge, self.moment)
        error = 1 - (weights * self.moment).sum(-1) / self.target_norm.clamp(min=smallest)
        return weights.float(), error.float()
