"""Train a vector model with the toolkit's trainer: phases, checkpoints, metrics, and a result at the end.

A run that was interrupted goes on when the same configuration is trained again; a finished one is only read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import nn

from .. import __version__
from ..errors import UserError
from ..runs.metrics_file import of_kind, read_metrics
from ..support.lock import locked
from ..support.sealed import digest_of
from ..training.callbacks import Evaluate
from ..training.metrics import MetricsWriter
from .data import Split, VectorData, WindowRows, Windows, load_data, split
from .diffusion import LatentDiffusion
from .embedders import find_model
from .fitting import CONFIG, TimeLimit, claim, device_of, fit_phase, metrics_of
from .metrics import predict, score
from .mixers.mixture import Mixture
from .model import build_model
from .run import TrainedModel, evaluate, latency, read_result, write_result
from .settings import PhaseConfig, RunConfig, write_config
from .steps import DiffusionStep, VectorStep

EVALUATED = 1024  # windows of an evaluation during training
FITTED = 20_000  # windows that a model's start is fitted on


def train(config: RunConfig, say: Callable[[str], None] = print) -> dict:
    """Train all phases and return the result, also in RUN/result.json.

    Args:
        config: of the run.
        say: where lines for people go.

    Raises:
        UserError: the directory holds another run, the data does not fit the model, a phase has no windows, or the time
            is over.
    """
    out = Path(config.out)
    with locked(out):
        claim(out, config)
        if (result := read_result(out)) is not None:
            say(f"{out} is finished: cosine {result['metrics']['cosine']:.4f}")
            return result
        data = load_data(config.data)
        config = with_width(config, data)
        both = split(data, config.data)
        torch.manual_seed(config.seed)
        model = build_model(config.model)
        if config.model.pretrained is not None:
            model.blocks[0].mixer.begin_as(find_model(config.model.pretrained)[0])
        some = both.train.evenly(FITTED)
        model.fit(data.vectors[some.starts[:, None] + torch.arange(some.context)], data.vectors[some.targets])
        write_config(config, out / CONFIG)
        params = sum(p.numel() for p in model.parameters() if p.requires_grad)
        counts = f"{len(both.train):,} windows to train, {len(both.val):,} to validate"
        say(f"{config.model.arch}: {params:,} parameters; {counts}")
        with metrics_of(config) as writer:
            for phase in config.all_phases():
                _run_phase(config, phase, model, both, writer, say)
        result = _result(config, model, both, params, out)
        write_result(out, result)
    return result


def with_width(config: RunConfig, data: VectorData) -> RunConfig:
    """Return the configuration with the width of the data, and see that data and model fit (`UserError`)."""
    width = data.vectors.shape[1]
    if config.model.d_in not in (None, width):
        raise UserError(
            f"model.d_in={config.model.d_in}, but {config.data.source} has vectors of {width}",
            f"leave model.d_in out, or set it to {width}",
        )
    if config.model.tmd != "none" and data.codes is None:
        raise UserError(
            f"model.tmd={config.model.tmd}, but {config.data.source} has no TMD codes", "use model.tmd=none"
        )
    return config.model_copy(update={"model": config.model.model_copy(update={"d_in": width})})


def phase_windows(phase: PhaseConfig, windows: Windows) -> Windows:
    """Return the windows that a phase trains on.

    Raises:
        UserError: there are none in its band.
    """
    if phase.band is not None:
        low, high = phase.band
        near = windows.nearness()
        chosen = windows.select((near >= low) & (near < high))
        if not len(chosen):
            raise UserError(
                f"phase {phase.name}: no window has a cosine of {low} to {high} between its last vector and the target",
                f"they lie between {float(near.min()):.3f} and {float(near.max()):.3f}: change the band",
            )
        windows = chosen
    return windows.first(phase.limit)


def _run_phase(
    config: RunConfig,
    phase: PhaseConfig,
    model: nn.Module,
    both: Split,
    writer: MetricsWriter,
    say: Callable[[str], None],
) -> None:
    """Run a phase, or what is left of it."""
    windows = phase_windows(phase, both.train)
    say(f"{phase.name}: {phase.steps} steps of {config.batch} windows, out of {len(windows):,}")
    if phase.dropout is not None and isinstance(dropout := getattr(model, "dropout", None), nn.Dropout):
        dropout.p = phase.dropout
    fit_phase(
        model,
        _step(config, phase, model, windows),
        WindowRows(windows, config.seed),
        config,
        phase,
        config.data.context,
        writer,
        {"seed": config.seed, "data": both.train.data.digest, "phase": phase.model_dump(mode="json")},
        [
            Evaluate(partial(_evaluation, TrainedModel(config, model), both)),
            *([TimeLimit(config.minutes)] if config.minutes else []),
        ],
    )


def _step(config: RunConfig, phase: PhaseConfig, model: nn.Module, windows: Windows) -> VectorStep | DiffusionStep:
    loss = phase.loss or config.loss
    if isinstance(model, LatentDiffusion):
        return DiffusionStep(loss)
    return VectorStep(loss, windows, config.batch, config.model.resolutions)


def _evaluation(trained: TrainedModel, both: Split, done: int) -> dict[str, float]:
    """Return a few numbers on validation windows."""
    some = both.val.evenly(EVALUATED)
    training = trained.model.training
    trained.model.eval()
    numbers = score(predict(trained, some), some)
    trained.model.train(training)
    return {name: numbers[name] for name in ("cosine", "mse", "ca", "r10") if name in numbers}


def _result(config: RunConfig, model: nn.Module, both: Split, params: int, out: Path) -> dict:
    """Return what a finished run is, and has measured."""
    trained = TrainedModel(config, model.eval())
    rows = of_kind(read_metrics(out / "metrics.jsonl"), "train")
    speed = median(row["tokens_per_s"] for row in rows)
    context, data = config.data.context, both.train.data
    return {
        "arch": config.model.arch,
        "pattern": config.model.resolved().pattern,
        "params": params,
        "seed": config.seed,
        "settings": digest_of(config.identity()),
        "mixtures": [
            [round(weight, 4) for weight in module.weights().tolist()]
            for module in model.modules()
            if isinstance(module, Mixture)
        ],
        "phases": [phase.name for phase in config.all_phases()],
        "data": {"source": config.data.source, "digest": data.digest, "space": data.card["space"]}
        | {"train": len(both.train), "val": len(both.val), "dim": config.model.d_in},
        "metrics": evaluate(trained, both) | latency(trained, both),
        "train_minutes": len(rows) * config.batch * context / speed / 60,
        "minutes_per_epoch": len(both.train) * context / speed / 60,
        "device": str(device_of(config.device)),
        "threads": torch.get_num_threads(),
        "version": __version__,
    }
