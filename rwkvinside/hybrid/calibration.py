"""The start of a mixer from the teacher's own attention, layer by layer and in closed form: no training, no constant
to tune.

What copying the projections leaves open, and this fits on a few thousand tokens:
- how fast each head forgets and how strongly it overwrites (decay w0 and in-context rate a0, one value per head), by a
  search over half-lives and rates that minimizes the squared error to the teacher head's output;
- the scale of each head's output and the weight of the current token (bonus r_k), by least squares for every candidate
  of that search, because an unnormalized sum replaces a weighted mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.batch import Batch, attention_mask_4d
from ..modeling.first_layer import FirstLayerKV, ForwardContext
from ..modeling.time_mixer import DECAY_SCALE, ProjectedInputs, TimeMixer, times_shared
from .adapters import disabled
from .model import HybridModel

# Candidates: half-lives in tokens from the fastest representable decay on, rates as the mixer's sigmoid gives them.
HALF_LIVES = tuple(2**e for e in (0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12))
RATES = (0.0005, 0.01, 0.05, 0.15, 0.3, 0.5, 0.7, 0.9)
ROUNDS = 2  # decay, rate, then both again with the other one's value


@dataclass(frozen=True)
class LayerFit:
    """What one layer got; lists are per head.

    Args:
        error: squared error to the teacher heads' outputs relative to their squared norm, after the fit.
        error_before: the same with the initial decay and rate and the best output scale.
        half_life: tokens after which a head's state has lost half.
        rate: in-context learning rate.
        scale: factor of the head's output, bonus: weight of the current token.
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
        batches: a few thousand tokens; the whole set's hidden states of one layer are held at a time.
        progress: called with the layer index after each layer.

    Returns:
        What was fitted, by layer.
    """
    fits: dict[int, LayerFit] = {}
    firsts: list[FirstLayerKV | None] = [None] * len(batches)
    for i, inputs in _layer_inputs(model, batches):
        if i in model.mixers:
            firsts, fits[i] = _fit(model.mixers[i], inputs, firsts)
        if progress is not None:
            progress(i)
    return fits


@torch.no_grad()
def teacher_norms(model: HybridModel, batches: list[Batch]) -> tuple[dict[int, float], dict[int, float]]:
    """Per converted layer, over all tokens of the batches: the mean squared norm of the teacher's attention output
    (the weight of the alignment loss), and the student's squared error relative to it (1 is what an output of zeros
    would get)."""
    sums: dict[int, list[float]] = {}
    for batch in batches:
        for i, (error, norm) in model(batch, mode="align").items():
            total = sums.setdefault(i, [0.0, 0.0])
            total[0] += float(error)
            total[1] += float(norm)
    tokens = sum(batch.num_tokens for batch in batches)
    return {i: norm / tokens for i, (_, norm) in sums.items()}, {i: error / norm for i, (error, norm) in sums.items()}


@dataclass(frozen=True)
class _Input:
    """One batch as a layer's attention sees it: x (B, T, D) after the input norm, rotation, documents."""

    x: Tensor
    rope: tuple[Tensor, Tensor]
    batch: Batch
    allowed: Tensor  # (B, 1, T, T)


def _layer_inputs(model: HybridModel, batches: list[Batch]) -> Iterator[tuple[int, list[_Input]]]:
    """Walk the teacher one layer at a time, so that only one layer's hidden states are alive."""
    backbone = model.lm.model
    hidden = [backbone.embed_tokens(batch.input_ids) for batch in batches]
    ropes = [backbone.rotary_emb(h, batch.position_ids) for h, batch in zip(hidden, batches, strict=True)]
    masks = [attention_mask_4d(batch) for batch in batches]
    for i, layer in enumerate(backbone.layers):
        given = zip(hidden, ropes, batches, masks, strict=True)
        yield i, [_Input(layer.input_layernorm(h), *rest) for h, *rest in given]
        with disabled(layer, but="student_attn."):
            hidden = [
                layer(
                    h,
                    attention_mask=mask,
                    position_ids=batch.position_ids,
                    position_embeddings=rope,
                    forward_context=ForwardContext(mode="teacher"),
                )
                for h, rope, batch, mask in zip(hidden, ropes, batches, masks, strict=True)
            ]


def _fit(
    mixer: TimeMixer, inputs: list[_Input], firsts: list[FirstLayerKV | None]
) -> tuple[list[FirstLayerKV], LayerFit]:
    c = mixer.mixer_config
    H, N = c.num_heads, c.head_size
    targets = [_teacher_heads(mixer, given) for given in inputs]
    if c.bonus:
        mixer.r_k.zero_()  # the recurrence alone; the bonus is a feature of its own in the regression
    half_lives = torch.tensor([h for h in HALF_LIVES if math.log(2) / h < DECAY_SCALE])
    candidates = {
        "w0": torch.logit(math.log(2) / half_lives / DECAY_SCALE),
        "a0": torch.logit(torch.tensor(RATES)),
    }

    ((_, before),) = _regress(mixer, inputs, firsts, targets)
    error = before
    for _ in range(ROUNDS):
        for name, values in candidates.items():
            best = getattr(mixer, name).view(H, N).clone()
            for value, (_, tried) in zip(values, _regress(mixer, inputs, firsts, targets, name, values), strict=True):
                best[tried < error] = float(value)
                error = torch.minimum(error, tried)
            getattr(mixer, name).copy_(best.view_as(getattr(mixer, name)))
    ((weights, error),) = _regress(mixer, inputs, firsts, targets)

    scale = weights[:, 0]
    # folded into the output projection: the gate and the copied value stay what they are
    mixer.output.weight.view(-1, H, N).mul_(scale.to(mixer.output.weight)[:, None])
    # a head whose values are all zero has nothing to fit: its scale is 0 and any bonus is right
    bonus = (weights[:, 1] / scale).nan_to_num(0, 0, 0) if c.bonus else torch.zeros_like(scale)
    if c.bonus:
        mixer.r_k.copy_(bonus[:, None].expand(H, N))
    fit = LayerFit(
        error=float(error.mean()),
        error_before=float(before.mean()),
        half_life=(math.log(2) / (DECAY_SCALE * torch.sigmoid(mixer.w0.view(H, N)).mean(-1))).tolist(),
        rate=torch.sigmoid(mixer.a0.view(H, N)).mean(-1).tolist(),
        scale=scale.tolist(),
        bonus=bonus.tolist(),
    )
    return [_features(mixer, given, first)[1] for given, first in zip(inputs, firsts, strict=True)], fit


def _features(mixer: TimeMixer, given: _Input, first: FirstLayerKV | None) -> tuple[ProjectedInputs, FirstLayerKV]:
    return mixer.project_inputs(given.x, first=first, rope=given.rope, cu_seqlens=given.batch.cu_seqlens)[:2]


def _teacher_heads(mixer: TimeMixer, given: _Input) -> Tensor:
    """The teacher's attention before its output projection, (B, T, H, N), from the projections the mixer copied."""
    q, k, v = (t.transpose(1, 2) for t in mixer.project(given.x, given.x, given.x, given.rope))
    rows = zip(q.split(1), k.split(1), v.split(1), given.allowed.split(1), strict=True)  # one (H, T, T) at a time
    heads = [F.scaled_dot_product_attention(*row[:3], attn_mask=row[3], enable_gqa=True) for row in rows]
    return torch.cat(heads).transpose(1, 2)


def _regress(
    mixer: TimeMixer,
    inputs: list[_Input],
    firsts: list[FirstLayerKV | None],
    targets: list[Tensor],
    name: str | None = None,
    values: Sequence[float] = (math.nan,),
) -> list[tuple[Tensor, Tensor]]:
    """Least squares of the teacher heads on [recurrence, bonus], for each value of the parameter `name`, which is left
    at the last one; None: once, as the mixer is. Values share what does not depend on them.

    Returns:
        For each value the weights (H, 1 or 2) and the relative squared error (H,).
    """
    c = mixer.mixer_config
    sums = [_Sums() for _ in values]
    for given, first, target in zip(inputs, firsts, targets, strict=True):
        features, _ = _features(mixer, given, first)
        for value, total in zip(values, sums, strict=True):
            if name is not None:
                getattr(mixer, name).fill_(float(value))
            s = mixer.recurrence_inputs(features)
            y, _ = mixer.run_recurrence(s, None, None, given.batch.cu_seqlens)
            parts = [y * s.gate] + ([times_shared((s.r * s.k).sum(-1, keepdim=True), s.v) * s.gate] if c.bonus else [])
            total.add([part.float() for part in parts], target.float(), given.batch.mask)
    return [total.solve() for total in sums]


class _Sums:
    """Normal equations of every head, in fp64 from the tokens on."""

    def __init__(self):
        self.gram = self.moment = self.power = 0

    def add(self, parts: list[Tensor], target: Tensor, mask: Tensor) -> None:
        """Parts that should add up to the target, (B, T, H, N) each, where mask (B, T) is True."""

        def dot(x: Tensor, y: Tensor) -> Tensor:
            return ((x * y).sum(-1).double() * mask[..., None]).sum((0, 1))

        self.gram = self.gram + torch.stack([torch.stack([dot(x, y) for y in parts], -1) for x in parts], -1)
        self.moment = self.moment + torch.stack([dot(x, target) for x in parts], -1)
        self.power = self.power + dot(target, target)

    def solve(self) -> tuple[Tensor, Tensor]:
        """Weights (H, parts) and relative squared error (H,)."""
        smallest = torch.finfo(torch.float64).tiny  # keeps a head without any output solvable
        ridge = smallest + 1e-9 * self.gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        ridge = ridge * torch.eye(self.gram.shape[-1]).to(self.gram)
        weights = torch.linalg.solve(self.gram + ridge, self.moment)
        return weights.float(), (1 - (weights * self.moment).sum(-1) / self.power.clamp(min=smallest)).float()
