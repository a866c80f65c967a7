"""Train a vector model with the toolkit's trainer: phases, checkpoints, metrics, and a result at the end.

A run that was interrupted goes on when the same configuration is trained again; a finished one is only read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from .. import __version__
from ..errors import Interrupted, UserError
from ..runs.metrics_file import of_kind, read_metrics
from ..support.lock import entries, locked
from ..support.sealed import digest_of
from ..training.callbacks import Callback, Evaluate, ShowProgress, WriteMetrics
from ..training.checkpoint import Checkpointer, newest_checkpoint, open_checkpoint
from ..training.local_engine import LocalEngine
from ..training.loggers import Loggers
from ..training.metrics import Console, MetricsWriter
from ..training.process_group import Distributed
from ..training.schedule import Schedule, StageLength
from ..training.trainer import Trainer, TrainingPlan
from .data import Split, VectorBatch, VectorData, WindowRows, Windows, load_data, split
from .diffusion import LatentDiffusion
from .metrics import predict, score
from .model import build_model
from .run import CONFIG, STAGES, TrainedModel, evaluate, latency, read_config, read_result, write_result
from .settings import PhaseConfig, RunConfig, write_config
from .steps import DiffusionStep, VectorStep

EVALUATED = 1024  # windows of an evaluation during training
WARMUP = 0.1  # part of a phase, unless optim.warmup_steps says otherwise


class TimeLimit(Callback):
    """Ends training after so many minutes of this process (`UserError`)."""

    def __init__(self, minutes: float):
        self._minutes, self._end = minutes, time.monotonic() + 60 * minutes

    def step(self, trainer: Trainer, row: dict) -> None:
        """Look at the clock."""
        if time.monotonic() > self._end:
            raise UserError(
                f"{trainer.plan.stage} stopped after {trainer.done} steps: {self._minutes:g} minutes are over",
                "raise `minutes`, or train fewer or smaller steps",
            )


class SaveBuffers(Callback):
    """Saves what of a model does not train."""

    main_only = True

    def __init__(self, model: nn.Module):
        self._model = model

    def extra_tensors(self, trainer: Trainer) -> Mapping[str, Tensor]:
        """Return buffers and frozen parameters."""
        return {n: t for n, t in self._model.state_dict().items() if n not in trainer.engine.trainable}


def train(config: RunConfig, say: Callable[[str], None] = print) -> dict:
    """Train all phases and return the result, also in RUN/result.json.

    Args:
        config: of the run; `model.d_in` is checked with the data.
        say: where lines for people go.

    Raises:
        UserError: the directory holds another run, the data does not fit the model, a phase has no windows, or the time
            is over.
    """
    out = Path(config.out)
    with locked(out):
        _claim(out, config)
        if (result := read_result(out)) is not None:
            say(f"{out} is finished: cosine {result['metrics']['cosine']:.4f}")
            return result
        data = load_data(config.data)
        check_width(config, data)
        both = split(data, config.data)
        torch.manual_seed(config.seed)
        model = build_model(config.model)
        if isinstance(model, LatentDiffusion):
            model.normalizer.fit(data.vectors[both.train.targets])
        write_config(config, out / CONFIG)
        params = sum(p.numel() for p in model.parameters() if p.requires_grad)
        counts = f"{len(both.train):,} windows to train, {len(both.val):,} to validate"
        say(f"{config.model.arch}: {params:,} parameters; {counts}")
        loggers = Loggers(config.loggers, out, config.model_dump(mode="json"))
        loggers.open()
        try:
            writer = MetricsWriter(out, loggers)
            for phase in config.all_phases():
                _run_phase(config, phase, model, both, writer, say)
        except Interrupted as stopped:
            raise Interrupted(stopped.cause, "the same command goes on from there") from stopped
        finally:
            loggers.close()
        result = _result(config, model, both, params, out)
        write_result(out, result)
    return result


def check_width(config: RunConfig, data: VectorData) -> None:
    """Refuse data of another width than the model's (`UserError`)."""
    width = data.vectors.shape[1]
    if width != config.model.d_in:
        raise UserError(
            f"model.d_in={config.model.d_in}, but {config.data.source} has vectors of {width}",
            f"set model.d_in={width}",
        )
    if config.model.tmd != "none" and data.codes is None:
        raise UserError(
            f"model.tmd={config.model.tmd}, but {config.data.source} has no TMD codes", "use model.tmd=none"
        )


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


def groups_of(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Return the trainable parameters by learning-rate group: `dynamics` of mixers, at a tenth of the rate, and all."""
    slow = {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        for ends in [getattr(module, "dynamics", ())]
        for name, _ in module.named_parameters()
        if ends and name in ends
    }
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    groups = {"all": {n: p for n, p in named.items() if n not in slow}, "dynamics": {n: named[n] for n in sorted(slow)}}
    return {name: group for name, group in groups.items() if group}


def _claim(out: Path, config: RunConfig) -> None:
    """Refuse a directory that holds something else."""
    if (out / CONFIG).is_file():
        there = read_config(out)
        if _identity(there) != _identity(config):
            raise UserError(f"{out} holds a run with other settings", "use another --out, or remove it")
    elif entries(out):
        raise UserError(f"{out} is not empty and not a run of vector models", "use another --out")


def _identity(config: RunConfig) -> dict:
    """Return the settings that decide what a run computes."""
    return config.model_dump(mode="json", exclude={"out", "log_every", "minutes", "loggers"})


def _run_phase(
    config: RunConfig,
    phase: PhaseConfig,
    model: nn.Module,
    both: Split,
    writer: MetricsWriter,
    say: Callable[[str], None],
) -> None:
    """Run a phase, or what is left of it."""
    out, steps = Path(config.out), phase.steps or 1
    windows = phase_windows(phase, both.train)
    tokens = config.batch * config.data.context
    length = StageLength(steps * tokens, tokens, config.data.context)
    checkpointer = Checkpointer(out / STAGES / phase.name, _identity(config)["model"], keep=1)
    newest = newest_checkpoint(checkpointer.directory)
    if newest is not None and open_checkpoint(newest).state["finished"]:
        model.load_state_dict(open_checkpoint(newest).tensors())
        say(f"{phase.name} is finished")
        return
    say(f"{phase.name}: {steps} steps of {config.batch} windows, out of {len(windows):,}")
    _set_dropout(model, phase.dropout)
    world = Distributed(_device(config.device))
    groups = groups_of(model)
    engine = LocalEngine(model.train(), groups, config.optim, world, config.precision)
    rate = config.optim.lr if phase.lr is None else phase.lr
    final = 0.1 * rate if config.optim.lr_final is None else config.optim.lr_final
    peaks = {"all": rate, "dynamics": 0.1 * rate}
    decay = config.optim.decay
    warmup = config.optim.warmup_steps
    schedule = Schedule(
        {name: peaks[name] for name in groups},
        {name: final * peaks[name] / rate if rate else 0.0 for name in groups},
        warmup_steps=round(WARMUP * steps) if warmup is None else warmup,
        shape=decay.shape,
        start=decay.start,
        end=decay.end,
    )
    trained = TrainedModel(config, model)
    trainer: Trainer[VectorBatch] = Trainer(
        engine,
        _step(config, phase, model, windows),
        WindowRows(windows, config.seed),
        TrainingPlan(phase.name, length, schedule, config.batch, config.evaluate_every, config.save_every),
        checkpointer=checkpointer,
        settings={"seed": config.seed, "data": both.train.data.digest, "phase": phase.model_dump(mode="json")},
        callbacks=[
            Evaluate(partial(_evaluation, trained, both)),
            SaveBuffers(model),
            WriteMetrics(writer),
            ShowProgress(Console(phase.name, steps, config.log_every)),
            *([TimeLimit(config.minutes)] if config.minutes else []),
        ],
    )
    if newest is not None:
        trainer.restore(checkpointer.load())
    trainer.fit()
    model.to("cpu").eval()


def _step(config: RunConfig, phase: PhaseConfig, model: nn.Module, windows: Windows) -> VectorStep | DiffusionStep:
    loss = phase.loss or config.loss
    if isinstance(model, LatentDiffusion):
        return DiffusionStep(loss)
    return VectorStep(loss, windows, config.batch, config.model.resolutions)


def _evaluation(trained: TrainedModel, both: Split, done: int) -> dict[str, float]:
    """Return a few numbers on validation windows."""
    some = both.val.select(torch.arange(len(both.val)) % -(-len(both.val) // EVALUATED) == 0)
    training = trained.model.training
    trained.model.eval()
    numbers = score(predict(trained, some), some)
    trained.model.train(training)
    return {name: numbers[name] for name in ("cosine", "mse", "ca", "r10")}


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
        "settings": digest_of(_identity(config)),
        "phases": [phase.name for phase in config.all_phases()],
        "data": {"source": config.data.source, "digest": data.digest, "space": data.card["space"]}
        | {"train": len(both.train), "val": len(both.val), "dim": config.model.d_in},
        "metrics": evaluate(trained, both) | latency(trained, both),
        "train_minutes": len(rows) * config.batch * context / speed / 60,
        "minutes_per_epoch": len(both.train) * context / speed / 60,
        "device": str(_device(config.device)),
        "threads": torch.get_num_threads(),
        "version": __version__,
    }


def _set_dropout(model: nn.Module, rate: float | None) -> None:
    if rate is not None and isinstance(dropout := getattr(model, "dropout", None), nn.Dropout):
        dropout.p = rate


def _device(name: str) -> torch.device:
    """Return where to compute (`UserError`: there is no GPU)."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no GPU", "use device: cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
