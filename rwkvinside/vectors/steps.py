"""What a step of training computes: sums of the losses over the predictions of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import losses
from .data import VectorBatch, Windows
from .decoders.registry import build_decoder
from .diffusion import LatentDiffusion
from .embedders import embedder_of
from .model import VectorModel
from .settings import LossConfig


class Resolutions:
    """Targets of lower resolution: principal components of the training vectors, L2-normalized.

    Args:
        vectors: (N, d) to fit on.
        widths: of the components.
    """

    def __init__(self, vectors: Tensor, widths: tuple[int, ...]):
        self.mean = vectors.mean(0)
        self.widths = widths
        most = max(widths)
        _, _, axes = torch.linalg.svd(vectors - self.mean, full_matrices=False)
        missing = most - len(axes)  # fewer vectors than components: the rest carries nothing
        self.axes = F.pad(axes[:most], (0, 0, 0, max(0, missing))).T

    def compress(self, vectors: Tensor) -> list[Tensor]:
        """Return vectors (..., d) at every width."""
        parts = (vectors - self.mean.to(vectors)) @ self.axes.to(vectors)
        return [F.normalize(parts[..., :width], dim=-1) for width in self.widths]


class VectorStep:
    """Next-vector prediction.

    Args:
        loss: weights.
        train: windows, for lower resolutions and for the decoder in the loop.
        rows_per_step: of training.
        resolutions: of the model.
    """

    def __init__(self, loss: LossConfig, train: Windows, rows_per_step: int, resolutions: tuple[int, ...] = ()):
        self.loss, self._rows = loss, rows_per_step
        vectors = train.data.vectors[train.targets]
        self._resolutions = Resolutions(vectors, resolutions) if resolutions else None
        self._decode_and_encode = read_again(loss.loop_decoder, train) if loss.loop_every else None

    def count(self, batch: VectorBatch) -> int:
        """Return the number of predictions; of a model that looks ahead the last position counts T times."""
        return batch.x.shape[0] * (batch.x.shape[1] if self.loss.positions == "all" else 1)

    def __call__(self, model: nn.Module, batch: VectorBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and metrics, summed over the predictions."""
        vector_model = cast(VectorModel, model)
        prediction = vector_model(batch.x, tmd=None if vector_model.config.tmd == "none" else batch.tmd)
        last = self.loss.positions == "last" or not vector_model.causal
        y, target = ((part[:, -1] if last else part.flatten(0, 1)) for part in (prediction.y, batch.y))
        scale = self.count(batch) / len(y)
        cosine = losses.cosine(y, target)
        parts = {"cosine": cosine, "mse": losses.mse(y, target)}
        if self.loss.infonce:
            parts["infonce"] = losses.infonce(y, target, self.loss.temperature)
        total = sum((getattr(self.loss, name) * part for name, part in parts.items()), y.new_zeros(len(y)))
        metrics = {"train_cosine": 1 - cosine, **{n: p for n, p in parts.items() if n != "cosine"}}
        if self._resolutions is not None:
            lower = [(p[:, -1] if last else p.flatten(0, 1)) for p in prediction.lower]
            true, own = self._resolutions.compress(target), self._resolutions.compress(y)
            for part, goal, compressed in zip(lower, true, own, strict=True):
                apart = losses.cosine(part, compressed)
                total = total + losses.cosine(part, goal) + self.loss.consistency * apart
                metrics["consistency"] = metrics.get("consistency", 0) + apart / len(lower)
        if self._decode_and_encode is not None:
            due = batch.rows[0] // self._rows % self.loss.loop_every == 0
            loop = losses.cosine(y, self._decode_and_encode(y.detach())) if due else y.new_zeros(len(y))
            total, metrics["loop"] = total + self.loss.loop * loop, loop
        sums = {name: scale * part.detach().sum() for name, part in metrics.items()}
        return scale * total.sum() + self.count(batch) * prediction.extra, sums


def read_again(spec: str, train: Windows) -> Callable[[Tensor], Tensor]:
    """Return a function that decodes vectors (N, d) to texts and encodes these again.

    It has no gradient: predictions are pulled to constants. Retrieval needs no embedder, as the vector of a stored text
    is the stored one.

    Args:
        spec: of the decoder.
        train: windows; retrieval finds their targets alone.

    Raises:
        UserError: see `build_decoder` and `embedder_of`.
    """
    if spec == "retrieval":
        stored = F.normalize(train.data.vectors[train.targets], dim=-1)
        return lambda y: stored.to(y)[(F.normalize(y, dim=-1) @ stored.to(y).T).argmax(1)]
    encoder = embedder_of(train.data.card, "use loss.loop_decoder=retrieval")
    decoder = build_decoder(spec, train.data)
    return lambda y: encoder.encode(decoder.decode(y.cpu())).to(y)


class DiffusionStep:
    """Denoising of the next vector after the window; `cosine` and `mse` weigh the estimate's distance to it."""

    def __init__(self, loss: LossConfig):
        self.loss = loss

    def count(self, batch: VectorBatch) -> int:
        """Return the number of predictions."""
        return len(batch.x)

    def __call__(self, model: nn.Module, batch: VectorBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and metrics, summed over the windows."""
        target = batch.y[:, -1]
        diffusion = cast(LatentDiffusion, model)
        denoising, estimate = diffusion.denoising_loss(batch.x, target, None if diffusion.tmd is None else batch.tmd)
        cosine, mse = losses.cosine(estimate, target), losses.mse(estimate, target)
        total = denoising + (self.loss.cosine * cosine + self.loss.mse * mse).sum()
        return total, {"denoising": denoising.detach(), "train_cosine": (1 - cosine).detach().sum()}
