"""How good predicted vectors are: one function from predictions to numbers, the same for models and baselines."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import VectorBatch, VectorData, Windows

Predictor = Callable[[VectorBatch], Tensor]  # contexts to the next vectors (B, d)
NEGATIVES = 16
RESAMPLES = 1000
SEED = 0


def predict(predictor: Predictor, windows: Windows, rows: int = 256) -> Tensor:
    """Return the predictions (M, d) for all windows."""
    with torch.no_grad():
        index = torch.arange(len(windows))
        return torch.cat([predictor(windows.batch(part)).float().cpu() for part in index.split(rows)])


def score(y: Tensor, windows: Windows, reference: Tensor | None = None) -> dict[str, float]:
    """Return the numbers of predictions.

    | name | meaning |
    |---|---|
    | cosine, cosine_low, cosine_high | mean cosine with the target, 95 % interval by bootstrap over documents |
    | gain, gain_low, gain_high | the same of the difference to `reference` on the same windows |
    | mse | squared distance, summed over the width |
    | ca | part of NEGATIVES vectors of other documents that are further away than the target |
    | r1, r10, mrr | rank of the target among all distinct validation targets |
    | decode | part whose nearest vector of all data has the target's text; absent without texts |
    | margin | cosine with the target minus cosine with the last context vector |

    Of a single document there are neither intervals nor ca.

    Args:
        y: (M, d).
        windows: that were predicted.
        reference: cosines (M,) to compare with, such as those of the context mean.
    """
    data, at = windows.data, windows.targets
    y, target = F.normalize(y, dim=-1), F.normalize(data.vectors[at], dim=-1)
    cosines = (y * target).sum(-1)
    documents = data.documents[at]
    numbers = {"cosine": float(cosines.mean())} | _interval("cosine", cosines, documents)
    if reference is not None:
        gains = cosines - reference
        numbers |= {"gain": float(gains.mean())} | _interval("gain", gains, documents)
    numbers["mse"] = float((y - target).pow(2).sum(-1).mean())
    if len(documents.unique()) > 1:
        numbers["ca"] = _contrastive(y, target, documents)
    numbers |= _ranks(y, target)
    if data.texts is not None:
        numbers["decode"] = decode_accuracy(y, data, at)
    last = F.normalize(data.vectors[at - 1], dim=-1)
    numbers["margin"] = float((cosines - (y * last).sum(-1)).mean())
    return numbers


def cosines(y: Tensor, windows: Windows) -> Tensor:
    """Return the cosine (M,) of predictions with their targets."""
    return F.cosine_similarity(y, windows.data.vectors[windows.targets], dim=-1)


def decode_accuracy(y: Tensor, data: VectorData, at: Tensor) -> float:
    """Return the part of predictions whose nearest stored vector has the text at positions `at`."""
    assert data.texts is not None
    stored = F.normalize(data.vectors, dim=-1)
    nearest = torch.cat([(part @ stored.T).argmax(1) for part in F.normalize(y, dim=-1).split(256)])
    pairs = zip(nearest.tolist(), at.tolist(), strict=True)
    return sum(data.texts[a] == data.texts[b] for a, b in pairs) / max(len(at), 1)


def _interval(name: str, values: Tensor, documents: Tensor) -> dict[str, float]:
    """Return the 95 % interval of a mean; windows of a document are drawn together, so a single one has none."""
    _, own = documents.unique(return_inverse=True)
    count = int(own.max()) + 1
    if count == 1:
        return {}
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, own, values.double())
    sizes = torch.bincount(own, minlength=count).double()
    drawn = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(SEED))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {f"{name}_low": low, f"{name}_high": high}


def _contrastive(y: Tensor, target: Tensor, documents: Tensor) -> float:
    """Return how often a random target of another document is further from the prediction than its own."""
    drawn = torch.randint(len(y), (len(y), NEGATIVES), generator=torch.Generator().manual_seed(SEED))
    other = documents[drawn] != documents[:, None]
    mine, theirs = (y * target).sum(-1, keepdim=True), torch.einsum("md,mnd->mn", y, target[drawn])
    return float(((mine > theirs) & other).sum() / other.sum().clamp(min=1))


def _ranks(y: Tensor, target: Tensor) -> dict[str, float]:
    pool, own = target.unique(dim=0, return_inverse=True)
    ranks = []
    for part, index in zip(y.split(256), own.split(256), strict=True):
        scores = part @ pool.T
        ranks.append((scores > scores.gather(1, index[:, None])).sum(1) + 1)
    rank = torch.cat(ranks).double()
    return {
        "r1": float((rank <= 1).double().mean()),
        "r10": float((rank <= 10).double().mean()),
        "mrr": float((1 / rank).mean()),
    }
