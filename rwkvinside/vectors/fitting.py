"""Train any model of vectors on the toolkit's trainer: one phase, resumed from its checkpoint, finished or refused."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import Interrupted, UserError
from ..support.lock import entries
from ..training.callbacks import Callback, ShowProgress, WriteMetrics
from ..training.checkpoint import Checkpoint, Checkpointer, newest_checkpoint, open_checkpoint
from ..training.local_engine import LocalEngine
from ..training.loggers import Loggers
from ..training.metrics import Console, MetricsWriter
from ..training.process_group import Distributed
from ..training.protocols import AnyBatch, RowSource, Step
from ..training.schedule import Schedule, StageLength
from ..training.trainer import Trainer, TrainingPlan
from .settings import AdamWConfig, PhaseConfig, TrainingConfig, load_config

CONFIG, STAGES = "config.yaml", "stages"
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
        """Return buffers and frozen parameters; what is tied to a weight that trains is not saved twice."""
        trained = {parameter.data_ptr() for parameter in trainer.engine.trainable.values()}
        state = self._model.state_dict().items()
        return {n: t for n, t in state if n not in trainer.engine.trainable and t.data_ptr() not in trained}


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Load all weights of a model from a checkpoint, see `load_tensors`."""
    load_tensors(model, checkpoint.tensors(), checkpoint.path)


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Load all weights of a model; of tied ones one is enough.

    Raises:
        UserError: some are missing, or are not the model's.
    """
    state = model.state_dict()
    loaded = {state[name].data_ptr() for name in tensors if name in state}
    absent, unknown = model.load_state_dict(tensors, strict=False)
    lost = [name for name in absent if state[name].data_ptr() not in loaded]
    if lost or unknown:
        raise UserError(f"{source} has weights of another model: {', '.join([*lost, *unknown][:3])}", "see its source")


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


def claim(out: Path, config: TrainingConfig) -> None:
    """Refuse a directory that holds something else than a run with this configuration.

    Where the configuration leaves the width of the vectors to the data, any width is the same.

    Raises:
        UserError: it holds something else.
    """
    if (out / CONFIG).is_file():
        there, asked = load_config(type(config), [out / CONFIG]).identity(), config.identity()
        if "model" in asked and asked["model"]["d_in"] is None:
            there["model"]["d_in"] = None
        if there != asked:
            raise UserError(f"{out} holds a run with other settings", "use another --out, or remove it")
    elif entries(out):
        raise UserError(f"{out} is not empty and not a run of vector models", "use another --out")


@contextmanager
def metrics_of(config: TrainingConfig) -> Iterator[MetricsWriter]:
    """Yield what writes the metrics of a training, to its loggers too; and say of an interrupted one how it goes on."""
    out = Path(config.out)
    loggers = Loggers(config.loggers, out, config.model_dump(mode="json"))
    loggers.open()
    try:
        yield MetricsWriter(out, loggers)
    except Interrupted as stopped:
        raise Interrupted(stopped.cause, "the same command goes on from there") from stopped
    finally:
        loggers.close()


def fit_phase(
    model: nn.Module,
    step: Step[AnyBatch],
    rows: RowSource[AnyBatch],
    config: TrainingConfig,
    phase: PhaseConfig,
    width: int,
    writer: MetricsWriter,
    settings: Mapping,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Run a phase, or what is left of it; the model ends on the CPU, in evaluation mode.

    Args:
        model: trained in place.
        step: the objective.
        rows: what it is trained on.
        config: of the training.
        phase: which part of it, with steps and learning rate.
        width: vectors or tokens of a row.
        writer: of metrics.
        settings: JSON values that a resumed run must share.
        callbacks: told before the metrics are written.
    """
    folder, steps = Path(config.out) / STAGES / phase.name, phase.steps or 1
    checkpointer = Checkpointer(folder, config.identity().get("model", {}), keep=1)
    newest = newest_checkpoint(folder)
    if newest is not None and open_checkpoint(newest).state["finished"]:
        load_weights(model, open_checkpoint(newest))
        model.eval()
        return
    items = config.batch * width
    length = StageLength(steps * items, items, width)
    groups = groups_of(model)
    schedule = _schedule(config.optim, phase, list(groups))
    engine = LocalEngine(
        model.train(), groups, config.optim.for_engine(), Distributed(device_of(config.device)), config.precision
    )
    trainer: Trainer[AnyBatch] = Trainer(
        engine,
        step,
        rows,
        TrainingPlan(phase.name, length, schedule, config.batch, config.evaluate_every, config.save_every),
        checkpointer=checkpointer,
        settings=settings,
        callbacks=[
            *callbacks,
            SaveBuffers(model),
            WriteMetrics(writer),
            ShowProgress(Console(phase.name, steps, config.log_every)),
        ],
    )
    if newest is not None:
        trainer.restore(checkpointer.load())
    trainer.fit()
    model.to("cpu").eval()


def _schedule(optim: AdamWConfig, phase: PhaseConfig, groups: Sequence[str]) -> Schedule:
    """Return the learning rates of a phase; that of `dynamics` is a tenth."""
    rate = optim.lr if phase.lr is None else phase.lr
    final = 0.1 * rate if optim.lr_final is None else optim.lr_final
    peaks = {"all": rate, "dynamics": 0.1 * rate}
    return Schedule(
        {name: peaks[name] for name in groups},
        {name: final * peaks[name] / rate if rate else 0.0 for name in groups},
        warmup_steps=round(WARMUP * (phase.steps or 1)) if optim.warmup_steps is None else optim.warmup_steps,
        shape=optim.decay.shape,
        start=optim.decay.start,
        end=optim.decay.end,
    )


def device_of(name: str) -> torch.device:
    """Return where to compute (`UserError`: there is no GPU)."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no GPU", "use device: cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
