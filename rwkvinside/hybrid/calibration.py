"""The start of a mixer from the teacher's own attention, without training.

It is computed layer by layer and in closed form, on a few thousand tokens and with no constant to tune. Every layer
reads what the student's layers before it, fitted already, give it; what it is fitted to is the teacher's. So it learns
to cope with their errors, and takes back what it can of them.

What copying the projections leaves open, and this fits, in this order:
- how fast each head forgets and how strongly it overwrites (decay w0 and in-context rate a0, one value per head), by a
  search over half-lives and rates that minimizes the squared error to the teacher head's output;
- the scale of each head's output, the weight of the current token (bonus r_k) and that of the window, by least squares
  for every candidate of that search, because an unnormalized sum replaces a weighted mean, and because the search then
  fits what the window leaves over;
- the output projection, by ridge regression over all heads, to what takes the student's residual stream to the
  teacher's; where a norm comes between the attention and the stream, to the attention's output.

Each token's error counts relative to the size of the residual stream there, or of the attention's output: what follows
reads it through a norm, and a few tokens of real models are a thousand times larger than the others.
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
from ..modeling.window_attention import Attended
from .far_scores import Attention, fit_far_scores
from .gptq import refit
from .layerwise_teacher import AttentionActivations, LayerwiseStudent, LayerwiseTeacher, MixerInputs
from .model import HybridModel

# Candidates: half-lives in tokens from the fastest representable decay on, rates as the mixer's sigmoid gives them.
HALF_LIVES = tuple(2**e for e in (0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12))
RATES = (0.0005, 0.01, 0.05, 0.15, 0.3, 0.5, 0.7, 0.9)
ROUNDS = 2  # decay, rate, then both again with the other one's value
STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)  # of a ridge, in units of the mean second moment
LEAST_ODDS = 0.1  # that a share of zero leaves to what lies beyond a window
SEARCHED_TOKENS = 4096  # are enough for two numbers a head; the regressions go over all tokens


@dataclass(frozen=True)
class LayerFit:
    """What was fitted in one layer; lists are per head.

    Attributes:
        error: squared error to the teacher heads' outputs relative to their squared norm, after the fit.
        error_before: the same with the initial decay and rate and the best output scale, over the searched tokens.
        output_error: squared error of the output to what it was fitted to, relative to that's squared norm.
        half_life: tokens after which a head's state has lost half.
        rate: in-context learning rate.
        scale: factor of the head's output.
        bonus: weight of the current token.
        far_share: of the attention to what lies beyond the window, where that has a score.
    """

    error: float
    error_before: float
    output_error: float
    half_life: list[float]
    rate: list[float]
    scale: list[float]
    bonus: list[float]
    far_share: list[float]


@dataclass(frozen=True)
class Calibrated:
    """A fitted mixer with a window, and what a share of the fit is of.

    Attributes:
        mixer: the mixer.
        projection: its output projection before the fit, the teacher's; on the CPU, where a GPU has no room for it.
        fitted: mix_recurrence, mix_window, output projection, and the bias of the score of what lies beyond the window,
            after it; there, too.
    """

    mixer: TimeMixer
    projection: Tensor
    fitted: tuple[Tensor, Tensor, Tensor, Tensor | None]

    @classmethod
    def of(cls, mixer: TimeMixer, projection: Tensor) -> Calibrated:
        """Return a mixer as it is, fitted, with its output projection before the fit."""
        tensors = mixer.mix_recurrence, mixer.mix_window, mixer.output.weight
        recurrence, window, output = (x.detach().to("cpu", copy=True) for x in tensors)
        in_softmax = mixer.mixer_config.window_mix == "softmax"
        bias = mixer.far_bias.detach().to("cpu", copy=True) if in_softmax else None
        return cls(mixer, projection, (recurrence, window, output, bias))

    @torch.no_grad()
    def keep(self, share: float) -> None:
        """Give the mixer this share of the fit: at 0 it is its window alone, of a softmax nearly so."""
        recurrence, window, output, bias = self.fitted
        if bias is None:
            self.mixer.mix_recurrence.copy_(share * recurrence)
        else:  # the odds of what lies beyond the window; none at all would leave nothing to learn from
            self.mixer.far_bias.copy_(bias + math.log(max(share, LEAST_ODDS)))
        self.mixer.mix_window.copy_(1 + share * (window - 1))
        self.mixer.output.weight.copy_(self.projection + share * (output - self.projection))


@torch.no_grad()
def calibrate(
    model: HybridModel, batches: list[Batch], progress: Callable[[int], None] | None = None
) -> dict[int, LayerFit]:
    """Fit every mixer to the teacher, in place.

    Args:
        model: with its teacher attention and freshly initialized mixers.
        batches: a few thousand tokens; the whole set's activations of one layer are held at a time.
        progress: called with the layer index after each layer.

    Returns:
        What was fitted, by layer.
    """
    fits: dict[int, LayerFit] = {}
    teacher = LayerwiseTeacher(model, batches)
    student = LayerwiseStudent(model, teacher, batches)
    scale = model.family.residual_scale(model.lm.config) if model.family.attention_post_norm_path is None else None
    for i in range(model.lm.config.num_hidden_layers):
        activations = teacher.run(i)
        if i in model.rwkv_layers:
            mixer = model.mixers[i]
            given = zip(batches, activations, student.inputs(i), strict=True)
            with torch.autocast(mixer.output.weight.device.type, enabled=False):
                inputs = [_Input.of(mixer, scale, *fields) for fields in given]
                fits[i] = _fit(mixer, inputs, model.family.window(model.lm.config, i))
            del inputs
        del activations  # before the next layer's are made
        student.run(i)
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
        batch: the batch.
        own: what the student's mixer reads.
        rope: cos and sin of the rotation.
        heads: (B, T, H, N), the outputs of the teacher's heads.
        target: (B, T, D), what the output projection without its bias should give: what takes the student's stream to
            the teacher's behind the attention, or the attention's output.
        weight: (B, T), of a token's squared error; 0 for padding.
    """

    batch: Batch
    own: MixerInputs
    rope: tuple[Tensor, Tensor]
    heads: Tensor
    target: Tensor
    weight: Tensor

    @classmethod
    def of(
        cls, mixer: TimeMixer, scale: float | None, batch: Batch, activations: AttentionActivations, own: MixerInputs
    ) -> _Input:
        """Return the input of a mixer whose output projection is still the teacher's.

        Args:
            mixer: of the layer.
            scale: what its output is multiplied with before it joins the stream; None: a norm comes between.
            batch, activations, own: of one batch.
        """
        heads = activations.heads.float()
        target = mixer.output(heads)
        # on a GPU that computes in bf16 the teacher's weights and activations have it
        dtype = mixer.output.weight.dtype
        first = None if own.first is None else FirstLayerKV(*(x if x is None else x.to(dtype) for x in own.first))
        own = own._replace(x=own.x.to(dtype), first=first)
        cos, sin = (x.to(dtype) for x in activations.rope)
        if scale is None:
            size = target.square().mean(-1)
        else:
            before, after = own.stream.float(), activations.stream.float() + scale * target
            # relative to both streams: a token that is huge in one of them alone is lost, and must not hide the others
            size = before.square().mean(-1) + after.square().mean(-1)
            target = (after - before) / scale
        weight = batch.mask / size.clamp_min(torch.finfo(torch.float32).tiny)
        target = target if mixer.output.bias is None else target - mixer.output.bias
        return cls(batch, own, (cos, sin), heads.unflatten(-1, (-1, mixer.mixer_config.head_size)), target, weight)


def _fit(mixer: TimeMixer, inputs: list[_Input], own: int | None = None) -> LayerFit:
    c = mixer.mixer_config
    H, N = c.num_heads, c.head_size
    if c.bonus:
        mixer.r_k.zero_()  # the recurrence alone; the bonus is a separate term of the regressions
    searched = _leading(inputs, SEARCHED_TOKENS)
    far_share = _fit_far(mixer, searched, own) if c.window and c.window_mix == "softmax" else []
    error_before = _search(mixer, searched)
    ((weights, error),) = _regress(mixer, inputs)

    scale = weights[:, 0]
    if c.window:
        mixer.mix_recurrence.copy_(scale[:, None].expand(H, N))
        mixer.mix_window.copy_(weights[:, -1:].expand(H, N))
    else:  # folded into the output projection: the gate and the copied value stay what they are
        mixer.output.weight.view(-1, H, N).mul_(scale.to(mixer.output.weight)[:, None])
    # a head whose values are all zero has nothing to fit: its scale is 0 and any bonus is right
    bonus = (weights[:, 1] / scale).nan_to_num(0, 0, 0) if c.bonus else torch.zeros_like(scale)
    if c.bonus:
        mixer.r_k.copy_(bonus[:, None].expand(H, N))
    return LayerFit(
        error=float(error.mean()),
        error_before=float(error_before.mean()),
        output_error=_fit_output(mixer, inputs),
        half_life=(math.log(2) / (DECAY_SCALE * torch.sigmoid(mixer.w0.view(H, N)).mean(-1))).tolist(),
        rate=torch.sigmoid(mixer.a0.view(H, N)).mean(-1).tolist(),
        scale=scale.tolist(),
        bonus=bonus.tolist(),
        far_share=far_share,
    )


def _fit_far(mixer: TimeMixer, inputs: list[_Input], own: int | None) -> list[float]:
    """Fit the score of what lies beyond the window; return the share of attention that goes there, by head.

    Args:
        mixer, inputs: of the layer.
        own: how many tokens the teacher's attention sees; None: all before.
    """
    rows = []
    for layer_input in inputs:
        projected, batch = _project(mixer, layer_input), layer_input.batch
        q, k, v = (x.float() for x in (projected.r, projected.key, projected.value))
        rows.append(Attention(q, k, v, batch.segment_ids, layer_input.weight.float()))
    score = fit_far_scores(mixer.mixer_config, rows, own)
    if score is None:
        return []
    for name, value in (("far_key", score.key), ("far_bias", score.bias), ("far_growth", score.growth)):
        getattr(mixer, name).copy_(value)
    return score.share.tolist()


def _leading(inputs: list[_Input], tokens: int) -> list[_Input]:
    """Return the first batches that have this many tokens, or all."""
    leading: list[_Input] = []
    for layer_input in inputs:
        if sum(each.batch.num_tokens for each in leading) >= tokens:
            break
        leading.append(layer_input)
    return leading


def _search(mixer: TimeMixer, inputs: list[_Input]) -> Tensor:
    """Set decay and rate of every head to the best candidates; return the errors (H,) before."""
    c = mixer.mixer_config
    H, N = c.num_heads, c.head_size
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
    return error_before


def _project(mixer: TimeMixer, layer_input: _Input) -> ProjectedInputs:
    own, documents = layer_input.own, layer_input.batch.documents
    return mixer.project_inputs(own.x, first=own.first, rope=layer_input.rope, cu_seqlens=documents.cu_seqlens)[0]


def _terms(mixer: TimeMixer, projected: ProjectedInputs, layer_input: _Input) -> list[Tensor]:
    """Return what a head's output is a sum of, before the gate; (B, T, H, N) fp32 each."""
    s = mixer.recurrence_inputs(projected)
    y, _ = mixer.run_recurrence(s, None, None, layer_input.batch.documents.cu_seqlens)
    terms = [y]
    if mixer.mixer_config.bonus:
        terms.append(times_shared((s.r * s.k).sum(-1, keepdim=True), s.v))
    return [term.float() for term in terms]


def _window(mixer: TimeMixer, projected: ProjectedInputs, layer_input: _Input) -> Attended | None:
    """Return what the window adds to a head's output, in fp32; None for a mixer without one."""
    if not mixer.mixer_config.window:
        return None
    q, k, v = projected.r, projected.key, projected.value
    window, _ = mixer.window_features(q, k, v, cu_seqlens=layer_input.batch.documents.cu_seqlens)
    return Attended(*(None if x is None else x.float() for x in window))


def _regress(
    mixer: TimeMixer,
    inputs: list[_Input],
    name: str | None = None,
    values: Sequence[float] = (math.nan,),
) -> list[tuple[Tensor, Tensor]]:
    """Fit the teacher heads by the terms of the mixer's, in least squares.

    Args:
        mixer: the layer's.
        inputs: the layer's batches.
        name: a parameter to try values of, which is left at the last one; None: fit once, with the mixer as it is.
        values: of the parameter; they share what does not depend on them.

    Returns:
        For each value the weights (H, terms) and the relative squared error (H,).
    """
    sums = [_Sums() for _ in values]
    for layer_input in inputs:
        projected = _project(mixer, layer_input)
        window = _window(mixer, projected, layer_input)
        exact = [] if window is None else [window.values]
        weight = projected.gate if window is None or window.beyond is None else projected.gate * window.beyond
        for value, total in zip(values, sums, strict=True):
            if name is not None:
                getattr(mixer, name).fill_(float(value))
            terms = [term * weight for term in _terms(mixer, projected, layer_input)]
            total.add(terms + exact, layer_input.heads, layer_input.weight)
    return [total.solve() for total in sums]


def _fit_output(mixer: TimeMixer, inputs: list[_Input]) -> float:
    """Fit the output projection to the stream; return the relative squared error that is left."""
    features, targets = [], []
    for layer_input in inputs:
        projected = _project(mixer, layer_input)
        y, _ = mixer.run_recurrence(
            mixer.recurrence_inputs(projected), None, None, layer_input.batch.documents.cu_seqlens
        )
        output = y * projected.gate
        if (window := _window(mixer, projected, layer_input)) is not None:
            output = mixer.mixed(output, window)
        root = layer_input.weight.sqrt()[..., None]
        features.append((output.flatten(2).float() * root).flatten(0, 1))
        targets.append((layer_input.target * root).flatten(0, 1))
    feature, target = torch.cat(features), torch.cat(targets)
    weight = refit(mixer.output.weight.float(), feature, target, STRENGTHS)
    mixer.output.weight.copy_(weight)
    return float((target - feature @ weight.t()).square().sum() / target.square().sum())


class _Sums:
    """Normal equations of every head, summed over tokens in fp64."""

    def __init__(self):
        self.gram = self.moment = self.target_norm = 0

    def add(self, terms: list[Tensor], target: Tensor, weight: Tensor) -> None:
        """Add terms that should sum to the target, (B, T, H, N) each.

        Args:
            terms: of the regression.
            target: outputs of the teacher's heads.
            weight: (B, T), of a token's squared error.
        """

        def dot(x: Tensor, y: Tensor) -> Tensor:
            return ((x * y).sum(-1).double() * weight[..., None]).sum((0, 1))

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
