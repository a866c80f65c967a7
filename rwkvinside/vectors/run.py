"""A run on disk, and what can be done with a trained model: predict, score, time; also ensembles of runs.

RUN/config.yaml                  the configuration
RUN/metrics.jsonl                rows of training and evaluation
RUN/stages/<phase>/step-*/       checkpoints
RUN/result.json                  what was measured at the end
RUN/ensemble.json                in place of all of these: its members
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..support.files import write_json
from ..support.sealed import read_sealed, sealed
from ..training.checkpoint import newest_checkpoint, open_checkpoint
from .baselines import context_mean
from .data import Split, VectorBatch, load_data, split
from .diffusion import LatentDiffusion
from .fitting import CONFIG, STAGES, load_weights
from .metrics import Predictor, cosines, predict, score
from .model import build_model
from .settings import RunConfig, load_config

RESULT, ENSEMBLE = "result.json", "ensemble.json"
LATENCY_RUNS = 40


@dataclass(frozen=True)
class TrainedModel:
    """A model with its configuration, ready to predict."""

    config: RunConfig
    model: nn.Module

    def __call__(self, batch: VectorBatch) -> Tensor:
        """Return the predictions (B, d) for the contexts of a batch: a `Predictor`."""
        device = next(self.model.parameters()).device
        tmd = None
        if self.config.model.tmd != "none":
            tmd = None if batch.tmd is None else batch.tmd.to(device)
        return self.model(batch.x.to(device), tmd=tmd).y[:, -1].cpu()


def load_model(run: Path) -> TrainedModel:
    """Return the model of a run, from the last checkpoint of its last phase.

    Raises:
        UserError: there is no finished run.
    """
    config = read_config(run)
    checkpoint = newest_checkpoint(run / STAGES / config.all_phases()[-1].name)
    if checkpoint is None:
        raise UserError(f"{run} has no checkpoint of its last phase", "finish it: rwkvinside vectors train -c ...")
    model = build_model(config.model)
    load_weights(model, open_checkpoint(checkpoint))
    return TrainedModel(config, model.eval())


def read_config(run: Path) -> RunConfig:
    """Return the configuration of a run (`UserError`: it is none)."""
    if not (run / CONFIG).is_file():
        raise UserError(f"{run} is not a run of vector models: it has no {CONFIG}", "give the directory of a run")
    return load_config(RunConfig, [run / CONFIG])


def read_result(run: Path) -> dict | None:
    """Return what a finished run has measured, None of others.

    Raises:
        UserError: it was changed afterwards.
    """
    if not (run / RESULT).is_file():
        return None
    try:
        return read_sealed(run / RESULT)[0]
    except ValueError as error:
        raise UserError(f"{run}: {error}", "remove it and train the run again") from error


def write_result(run: Path, values: dict) -> None:
    """Write what a run has measured, with a seal."""
    write_json(run / RESULT, sealed(json.loads(json.dumps(values))))


def evaluate(predictor: Predictor, both: Split) -> dict[str, float]:
    """Return the numbers of a predictor on the validation windows, gains over the context mean included."""
    reference = cosines(predict(context_mean, both.val), both.val)
    return score(predict(predictor, both.val), both.val, reference)


def latency(predictor: Predictor, both: Split) -> dict[str, float]:
    """Return median and 95th percentile of the milliseconds of one prediction from one context."""
    batch = both.val.batch(torch.tensor([0]))
    times = []
    with torch.no_grad():
        for _ in range(LATENCY_RUNS + 3):
            start = time.perf_counter()
            predictor(batch)
            times.append(1000 * (time.perf_counter() - start))
    cuts = quantiles(times[3:], n=20)
    return {"p50_ms": cuts[9], "p95_ms": cuts[18]}


class Ensemble:
    """The mean of several models' normalized predictions, normalized again.

    Args:
        members: predictors.
        weights: of the members.
    """

    def __init__(self, members: Sequence[Predictor], weights: Sequence[float]):
        self.members, self.weights = members, weights

    def __call__(self, batch: VectorBatch) -> Tensor:
        """Return the predictions (B, d)."""
        parts = [w * F.normalize(m(batch), dim=-1) for m, w in zip(self.members, self.weights, strict=True)]
        return F.normalize(torch.stack(parts).sum(0), dim=-1)


def write_ensemble(out: Path, runs: Sequence[Path], weighted: bool = False) -> dict:
    """Write an ensemble of finished runs on the same data, measure it, and return its result.

    Args:
        out: its directory.
        runs: of the members.
        weighted: by the members' validation cosine; otherwise all count alike.

    Raises:
        UserError: a member is not finished, or the members' data differ.
    """
    results = []
    for run in runs:
        result = read_result(run)
        if result is None:
            raise UserError(f"member {run} of the ensemble is not finished", "train it first")
        results.append(result)
    digests = {result["data"]["digest"] for result in results}
    if len(digests) != 1:
        raise UserError(f"the members {', '.join(map(str, runs))} were trained on different data", "use the same data")
    windows = [read_config(run).data.model_dump(include={"context", "val", "reverse"}) for run in runs]
    if differs := next((i for i, each in enumerate(windows) if each != windows[0]), None):
        raise UserError(
            f"members {runs[0]} and {runs[differs]} have windows of their own: {windows[0]} and {windows[differs]}",
            "vote with runs of the same data.context, data.val and data.reverse",
        )
    weights = [result["metrics"]["cosine"] if weighted else 1.0 for result in results]
    members = [os.path.relpath(run.resolve(), out.resolve()) for run in runs]  # so that all of them can move together
    manifest = {"members": members, "weights": weights}
    write_json(out / ENSEMBLE, manifest)
    config = read_config(runs[0])
    both = split(load_data(config.data), config.data)
    predictor = load_predictor(out)
    alone = [result["metrics"]["cosine"] for result in results]
    values = results[0] | {
        "arch": "ensemble",
        "pattern": " + ".join(result["arch"] for result in results),
        "params": sum(result["params"] for result in results),
        "metrics": evaluate(predictor, both) | latency(predictor, both),
        "members_mean_cosine": sum(alone) / len(alone),
        "train_minutes": sum(result["train_minutes"] for result in results),
        "minutes_per_epoch": sum(result["minutes_per_epoch"] for result in results),
    }
    write_result(out, values)
    return values


def load_predictor(run: Path) -> Predictor:
    """Return the model or the ensemble of a directory.

    Raises:
        UserError: it is neither.
    """
    if not (run / ENSEMBLE).is_file():
        return load_model(run)
    members, weights = _manifest(run)
    return Ensemble([load_predictor(member) for member in members], weights)


def _manifest(ensemble: Path) -> tuple[list[Path], list[float]]:
    """Return the members of an ensemble and their weights."""
    manifest = json.loads((ensemble / ENSEMBLE).read_text(encoding="utf-8"))
    return [(ensemble / member).resolve() for member in manifest["members"]], manifest["weights"]


def data_of(run: Path) -> RunConfig:
    """Return the configuration that names the data of a run or of an ensemble's first member."""
    if (run / ENSEMBLE).is_file():
        return data_of(_manifest(run)[0][0])
    return read_config(run)


def set_diffusion(predictor: Predictor, steps: int | None, guidance: float | None) -> None:
    """Set the DDIM steps and the guidance of a diffusion model.

    Raises:
        UserError: the model does not denoise.
    """
    if steps is None and guidance is None:
        return
    model = predictor.model if isinstance(predictor, TrainedModel) else None
    if not isinstance(model, LatentDiffusion):
        raise UserError(
            "--steps and --guidance are for models that denoise", "leave them out: this one predicts at once"
        )
    model.steps = steps or model.steps
    model.guidance = model.guidance if guidance is None else guidance
