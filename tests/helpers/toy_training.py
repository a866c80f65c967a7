"""A model, a step and rows small enough to train in milliseconds, with everything that can go wrong in a real one.

Dropout (draws random numbers), a frozen part, parameters of one and two dimensions in two learning-rate groups, a
parameter that only every second step uses, a forward without gradient before the one with it, and nested outputs.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from rwkvinside.training.batching import StepShape
from rwkvinside.training.callbacks import Evaluate, SaveExtra, ShowProgress, WriteMetrics
from rwkvinside.training.deepspeed_engine import LocalEngine
from rwkvinside.training.process_group import Distributed
from rwkvinside.training.schedule import Schedule, StageLength
from rwkvinside.training.settings import OptimConfig
from rwkvinside.training.trainer import Trainer, TrainingPlan

SEQ_LEN, ROWS_PER_STEP, STEPS = 6, 8, 8
LENGTH = StageLength(STEPS * ROWS_PER_STEP * SEQ_LEN, ROWS_PER_STEP * SEQ_LEN, SEQ_LEN)
SCHEDULE = Schedule({"mixer": 3e-2, "rest": 1e-2}, {"mixer": 3e-3}, warmup_steps=2, end=0.9)
SHAPE = partial(StepShape, ROWS_PER_STEP)  # (micro_rows, ranks)
SETTINGS = OptimConfig(weight_decay=0.01, clip=0.5)


@dataclass(frozen=True)
class Rows:
    ids: torch.Tensor
    rows: tuple[int, ...]

    @property
    def num_tokens(self):
        return int((self.ids > 0).sum())

    def to(self, device):
        return replace(self, ids=self.ids.to(device))


class Source:
    """Row i is a function of i; lengths differ, so that micro-batches count differently."""

    def batch(self, rows):
        parts = []
        for row in rows:
            ids = torch.randint(1, 16, (SEQ_LEN,), generator=torch.Generator().manual_seed(1000 + row))
            ids[SEQ_LEN - row % 3 :] = 0
            parts.append(ids)
        return Rows(torch.stack(parts), tuple(rows))


class Model(nn.Module):
    def __init__(self, dropout=0.1):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.frozen = nn.Linear(8, 8)
        self.mixer = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.rare = nn.Parameter(torch.full((8, 3), 0.1))
        self.head = nn.Linear(8, 16)
        self.dropout = nn.Dropout(dropout)
        self.frozen.requires_grad_(False)

    def forward(self, batch, teacher=False):
        h = self.embed(batch.ids)
        if teacher:
            return {0: (self.frozen(h), None)}
        out = self.dropout(torch.tanh(self.mixer(h))) * self.scale
        if batch.rows[0] // ROWS_PER_STEP % 2:
            out = out + (h @ self.rare).sum(-1, keepdim=True)
        return {0: (out, self.head(out))}

    def groups(self):
        names = dict(self.named_parameters())
        mixer = {n: p for n, p in names.items() if n.startswith(("mixer", "scale"))}
        rest = {n: p for n, p in names.items() if n not in mixer and not n.startswith("frozen")}
        return {"mixer": mixer, "rest": rest}


class ToyStep:
    def count(self, batch):
        return int((batch.ids > 0).sum())

    def __call__(self, model, batch):
        with torch.no_grad():
            target, _ = model(batch, teacher=True)[0]
        out, logits = model(batch)[0]
        real = batch.ids > 0
        error = ((out - target).float() ** 2).sum(-1)[real].sum()
        ce = F.cross_entropy(logits[real].float(), batch.ids[real], reduction="sum")
        return error + ce, {"ce": ce.detach(), "layers": torch.stack([error.detach(), ce.detach()])}


class PoisonStep(ToyStep):
    def __init__(self, row, value="loss"):
        self.row, self.value = row, value

    def __call__(self, model, batch):
        loss, metrics = super().__call__(model, batch)
        if self.row in batch.rows:
            if self.value == "loss":
                return loss * torch.nan, metrics | {"layers": metrics["layers"] * torch.tensor([1.0, torch.nan])}
            loss.register_hook(lambda gradient: gradient * torch.inf)
        return loss, metrics


def model(dropout=0.1):
    torch.manual_seed(7)
    return Model(dropout)


def local_engine(dropout=0.1, precision="fp32"):
    toy = model(dropout)
    return LocalEngine(toy, toy.groups(), SETTINGS, Distributed("cpu"), precision)


def callbacks(options):
    """Take those out of keyword arguments that these name; what adds to rows comes first."""
    kinds = {"evaluate": Evaluate, "extra": SaveExtra, "metrics": WriteMetrics, "console": ShowProgress}
    return [kind(options.pop(name)) for name, kind in kinds.items() if name in options]


def trainer(engine, *, step=None, source=None, checkpointer=None, settings=None, **options):
    """Of the toy; `options` are those of `callbacks` and of the plan."""
    told = callbacks(options)
    plan = TrainingPlan(**{"stage": "toy", "length": LENGTH, "schedule": SCHEDULE, "micro_rows": 4} | options)
    source = source or Source()
    return Trainer(
        engine, step or ToyStep(), source, plan, checkpointer=checkpointer, settings=settings, callbacks=told
    )


class Losses:
    """A metrics writer that remembers."""

    def __init__(self):
        self.rows = []

    def begin(self, stage, step=None):
        self.rows = [row for row in self.rows if step is not None and row["step"] <= step]

    def write(self, row):
        self.rows.append(row)

    def __getitem__(self, name):
        return [row[name] for row in self.rows if row["kind"] == "train"]


# A stage in which "rest" joins after three steps.
BOUNDARY = 3
UNFREEZING = Schedule({"mixer": 3e-2, "rest@144": 1e-2}, {"mixer": 3e-3}, {"rest@144": BOUNDARY}, warmup_steps=2)


def phase_groups(toy, joined):
    """What trains before and after the boundary."""
    groups = toy.groups()
    for parameter in groups["rest"].values():
        parameter.requires_grad_(joined)
    return {"mixer": groups["mixer"]} | ({"rest@144": groups["rest"]} if joined else {})


def phase(make_engine, checkpointer, joined, dropout=0.0, restore=True, **options):
    """A trainer of the first or the second phase on a new model, restored if there is something."""
    toy = model(dropout)
    groups = phase_groups(toy, joined)
    schedule = replace(UNFREEZING, peak={name: UNFREEZING.peak[name] for name in groups})
    found = trainer(make_engine(toy, groups), checkpointer=checkpointer, schedule=schedule, **options)
    if restore and checkpointer.names():
        found.restore(checkpointer.load(), joined=groups.get("rest@144", ()))
    return found
