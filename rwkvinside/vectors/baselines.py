"""Predictors without a sequence model, computed for each data set: what a model has to beat.

| name | prediction |
|---|---|
| random | a random direction |
| train_mean | the mean of all training targets |
| copy_last | the last vector of the context |
| context_mean | the mean of the context |
| recent_mean | a mean in which vectors count less with age, and a share of the mean of all training targets |
| nn | the target of the training window whose context is nearest |
| linear | ridge regression on the whole context, its strength chosen on the last tenth of the training windows |
| mlp | one hidden layer on the whole context |
| oracle_nn | the training vector nearest to the true target: what retrieval could reach at most |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Split, VectorBatch, Windows
from .losses import cosine
from .metrics import Predictor, cosines, predict, score

NAMES = ("random", "train_mean", "copy_last", "context_mean", "recent_mean", "nn", "linear", "mlp", "oracle_nn")
# tried for recent_mean: factors per vector of age, and shares
FACTORS, SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.99), (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
MOST_ROWS = 20_000  # that are fitted on
HIDDEN, MLP_STEPS, MLP_ROWS = 256, 300, 64


def context_mean(batch: VectorBatch) -> Tensor:
    """Return the mean of the context."""
    return batch.x.mean(1)


def weighted_by_age(x: Tensor, factor: float) -> Tensor:
    """Return the mean (B, d) of contexts (B, T, d) in which a vector counts `factor` times the one after it."""
    weights = factor ** torch.arange(x.shape[1] - 1, -1, -1, device=x.device)
    return torch.einsum("t,btd->bd", weights / weights.sum(), x)


def best_recent_mean(x: Tensor, target: Tensor) -> tuple[float, Tensor]:
    """Return the factor, and the vector (d,) to add, of the `recent_mean` with the best cosine.

    Args:
        x: (N, T, d) contexts.
        target: (N, d).
    """
    mean, found = target.mean(0), {}
    for factor in FACTORS:
        recent = weighted_by_age(x, factor)
        for share in SHARES:
            found[factor, share] = float(F.cosine_similarity(recent + share * mean, target, dim=-1).mean())
    factor, share = max(found, key=lambda pair: found[pair])
    return factor, share * mean


def baseline(name: str, train: Windows) -> Predictor:
    """Return a baseline fitted on training windows; `name` is one of `NAMES`."""
    if name == "random":
        draw = torch.Generator().manual_seed(0)
        return lambda batch: torch.randn(len(batch.x), batch.x.shape[-1], generator=draw)
    if name == "train_mean":
        mean = train.data.vectors[train.targets].mean(0)
        return lambda batch: mean.expand(len(batch.x), -1)
    if name == "copy_last":
        return lambda batch: batch.x[:, -1]
    if name == "context_mean":
        return context_mean
    x, y = _contexts(train)
    if name == "recent_mean":
        factor, shift = best_recent_mean(x.unflatten(1, (train.context, -1)), y)
        return lambda batch: weighted_by_age(batch.x, factor) + shift
    if name == "linear":
        return _linear(x, y)
    if name == "mlp":
        return _mlp(x, y)
    if name == "oracle_nn":
        return lambda batch: _nearest(batch.y[:, -1], y, y)
    return lambda batch: _nearest(batch.x.flatten(1), x, y)


def evaluate_baselines(split: Split, names: tuple[str, ...] = NAMES) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield (name, numbers of `metrics.score`) of every baseline."""
    reference = cosines(predict(context_mean, split.val), split.val)
    for name in names:
        yield name, score(predict(baseline(name, split.train), split.val), split.val, reference)


def _contexts(train: Windows) -> tuple[Tensor, Tensor]:
    """Return contexts (M, T d) and targets (M, d)."""
    index = torch.arange(len(train))
    batch = train.batch(index[:: -(-len(index) // MOST_ROWS)])
    return batch.x.flatten(1), batch.y[:, -1]


def _nearest(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    scores = F.normalize(query, dim=-1) @ F.normalize(keys, dim=-1).T
    return values[scores.argmax(1)]


def _linear(x: Tensor, y: Tensor) -> Predictor:
    cut = max(1, len(x) - len(x) // 10)
    held = _Ridge(x[:cut], y[:cut])

    def error(strength: float) -> float:
        return float(cosine(held.fit(strength)(x[cut:]), y[cut:]).mean())

    apply = _Ridge(x, y).fit(min(STRENGTHS, key=error) if cut < len(x) else 1.0)
    return lambda batch: apply(batch.x.flatten(1))


class _Ridge:
    """Ridge regression of y (M, d) on x (M, n) for several strengths, relative to the mean squared length of x."""

    def __init__(self, x: Tensor, y: Tensor):
        self.center, self.mean = x.mean(0), y.mean(0)
        self.u, self.v = x - self.center, y - self.mean
        self.dual = len(x) < x.shape[1]  # the form with the smaller matrix
        self.inner = (self.u @ self.u.T if self.dual else self.u.T @ self.u).double()
        self.scale = float(self.u.pow(2).sum(1).mean())

    def fit(self, strength: float) -> Callable[[Tensor], Tensor]:
        """Return the fitted map."""
        inner = self.inner + strength * self.scale * torch.eye(len(self.inner), dtype=torch.float64)
        right = self.v if self.dual else self.u.T @ self.v
        solved = torch.linalg.solve(inner, right.double()).float()
        weight = self.u.T @ solved if self.dual else solved
        return lambda x: (x - self.center) @ weight + self.mean


def _mlp(x: Tensor, y: Tensor) -> Predictor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(x.shape[1], HIDDEN), nn.GELU(), nn.Linear(HIDDEN, y.shape[1]))
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        for _ in range(MLP_STEPS):
            rows = torch.randint(len(x), (MLP_ROWS,))
            loss = cosine(net(x[rows]), y[rows]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return lambda batch: net(batch.x.flatten(1)).detach()
