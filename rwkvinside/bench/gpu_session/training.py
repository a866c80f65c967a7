"""The stage `training`: optimizer steps of the project's own engine, in bf16 as users train, at real shapes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...conversion.build import make_engine, work_of
from ...data.batch import Batch
from ...hybrid.model import HybridModel
from ...losses.next_token import NextTokenLoss
from ...planning.devices import peak_flops
from ...planning.flops import training_flops
from ...planning.plan import meta_student
from ...planning.stage_memory import stage_memory
from ...stages.param_groups import rate_groups
from ...stages.plan import StagePlan
from ...stages.teacher import meta_online_teacher
from ...teacher.kinds import TeacherKind
from ...teacher.signals import OnlineTeacher, SelfTeacher, TeacherModel
from ...training.local_engine import LocalEngine
from ...training.process_group import Distributed
from ...training.protocols import Step, StepResult
from .end_to_end import compare
from .fused_layers import compare_layers, compare_rotation
from .losses import compare_errors, compare_losses
from .models import LARGE, SMALL, TINY, WINDOW, Shape, random_batch, random_teacher, stage_plan
from .profiling import kernels_of
from .timing import synchronize

if TYPE_CHECKING:
    from .stage import Stage

WARMUP, STEPS = 2, 5
# objectives whose graphs are compared with steps without, and more of their plans
GRAPHED: tuple[tuple[str, dict], ...] = (
    ("align", {}),
    ("align", {"window": WINDOW}),
    ("distill", {}),
    ("distill", {"checkpointing": "recurrence"}),
)
GRAPHS_APART = 1e-2  # of losses in bf16: flash attention adds its gradients up in any order
GIB = 2**30


class Sizes(NamedTuple):
    """Of what is measured.

    Attributes:
        small, large: shapes of teachers.
        rows, short: of a step of align, and of a micro-batch: 16384 tokens, as with fewer a GPU waits for Python.
        long: tokens of a row of distill.
        document: tokens of a document where rows are packed.
    """

    small: Shape
    large: Shape
    rows: int
    short: int
    long: int
    document: int


SIZES, DRY_SIZES = Sizes(SMALL, LARGE, 32, 512, 4096, 700), Sizes(TINY, TINY, 4, 16, 32, 12)


def timed(sizes: Sizes) -> list[tuple[str, Shape, int, int, dict]]:
    """Return objective, shape, rows and tokens of a step, and more of the plan of what is timed, in that order."""
    small, large, rows, short, long, document = sizes
    full, some = {"micro_rows": rows}, {"micro_rows": 4}
    graphs, window, packed = {"graphs": True}, {"window": WINDOW}, {"document": document}
    return [
        ("align", small, rows, short, full | graphs),
        ("distill", small, 8, long, some | graphs),
        ("align", large, rows, short, full | graphs),
        ("distill", large, 4, long, some | graphs | {"checkpointing": "recurrence"}),
        ("align", small, rows, short, full),
        ("distill", small, 8, long, some),
        ("align", small, rows, short, full | graphs | window),
        ("distill", small, 8, long, some | graphs | window),
        ("align", small, rows, short, {**graphs}),
        ("distill", small, 4, long, {**graphs}),
        ("distill", small, 8, long, some | graphs | packed),
        ("distill", large, 4, long, some | {"checkpointing": True}),
        ("distill", small, 8, long, some | graphs | {"checkpointing": "recurrence"}),
        ("align", small, rows, short, full | graphs | {"fused": False}),
        ("distill", small, 8, long, some | graphs | {"fused": False}),
        ("align", small, rows, short, {}),
        ("distill", small, 4, long, {}),
        ("distill", small, 8, long, some | packed),
        ("distill", small, 8, long, {"micro_rows": 8, "checkpointing": True}),
    ]


def run(stage: Stage) -> None:
    """Measure, what is least known first."""
    sizes = DRY_SIZES if stage.dry else SIZES
    small, _, rows, short, long, _ = sizes
    plan = partial(stage_plan, device=stage.device)
    few = replace(small, layers=min(small.layers, 4))

    def compare_with_graphs(objective: str, options: dict) -> None:
        compared = plan(few, objective, rows, short, micro_rows=max(1, rows // 4), **options)
        what = f"graphs: losses of {objective} {Case(compared).name}"
        stage.attempt(what, partial(compare_graphs, compared), needs=10)

    first, *others = GRAPHED
    compare_with_graphs(*first)
    stage.attempt("norms and MLPs fused", partial(compare_layers, rows * short, stage.device), needs=4)
    stage.attempt("rotations fused", partial(compare_rotation, rows * short, stage.device), needs=2)
    errors = partial(compare_errors, rows * short, small.hidden, stage.device)
    stage.attempt(f"error of a layer {rows * short} x {small.hidden}", errors, needs=2)
    names, profiled = set(), set()
    for objective, shape, *size, options in timed(sizes):
        packed, graphs = options.pop("document", None), options.pop("graphs", False)
        case = Case(with_graphs(plan(shape, objective, *size, **options), graphs), packed)
        graphed = case.plan.settings.cuda_graphs
        kind = objective, shape, "window" in options, graphed
        name = f"{objective} {case.name}"
        if name in names:  # without Liger's kernels
            continue
        names.add(name)
        if stage.attempt(name, case.speed, needs=10) and kind not in profiled:
            if not graphed:  # whose Python runs no more
                stage.attempt(f"{name}: inputs of the recurrence", case.recurrence_inputs)
            stage.attempt(f"{name}: kernels of a micro-batch", case.profile, needs=5)
            profiled.add(kind)
        case = None  # its models, before those of the next one
    tuning = FineTuning(plan(small, "distill", 8, long, micro_rows=4))
    stage.attempt(f"fine-tuning {tuning.name}", tuning.speed, needs=8)
    losses = partial(compare_losses, long, small.vocab, small.hidden, stage.device)
    stage.attempt(f"distillation loss {long} x {small.vocab}", losses, needs=6)
    stage.attempt("conversion end to end", partial(compare, stage.device), needs=15)
    for objective, options in others:
        compare_with_graphs(objective, options)


@dataclass
class Training:
    """What is timed.

    Attributes:
        plan: of the stage.
        engine: with the model and its learning rates.
        step: of the objective.
        batches: of one step.
        work: operations for a token.
    """

    plan: StagePlan
    engine: LocalEngine
    step: Step[Batch]
    batches: list[Batch]
    work: float

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return sum(batch.input_ids.numel() for batch in self.batches)


class Case:
    """One stage at one shape; its models are made when they are first needed.

    Args:
        plan: of the stage.
        document: tokens of a document; None: a row is one.
    """

    def __init__(self, plan: StagePlan, document: int | None = None):
        self.plan, self.document = plan, document

    @property
    def name(self) -> str:
        """Shape of the teacher and of a step."""
        recomputed = self.plan.stage.recomputed(self.plan.settings)
        more = f", recomputed {recomputed}" if recomputed else ""
        more += ", window" if self.plan.run.student.window else ""
        more += ", fused" if self.plan.run.fused.layers else ""
        more += ", graphed" if self.plan.settings.cuda_graphs is True else ""
        return step_name(self.plan) + more + (", packed" if self.document else "")

    @cached_property
    def training(self) -> Training:
        """Models, optimizer and batch, made as `conversion` makes them."""
        plan, run, phase = self.plan, self.plan.run, self.plan.phases[-1]
        batches = step_batches(plan, self.document)
        student = HybridModel.from_teacher(random_teacher(run), run.student).eval()
        kind = plan.stage.prepare(student, plan, phase.train)
        if kind is not TeacherKind.SELF:
            student.release_teacher()
        teacher = OnlineTeacher(TeacherModel(random_teacher(run))) if kind is TeacherKind.ONLINE else SelfTeacher()
        groups, work = rate_groups(student, plan, phase), work_of(plan, student, kind, teacher)
        engine = make_engine(plan, phase, student, Distributed(run.device))
        with engine.autocast():
            step = plan.stage.step(engine.module, teacher, plan, lambda tokens: batches)
        student.recompute(plan.stage.recomputed(plan.settings))
        engine.set_rates(plan.schedule(groups).rates(plan.rates.warmup_steps, plan.length))
        return Training(plan, engine, step, batches, work)

    def speed(self) -> dict:
        """Return speed and memory, next to what the plan predicts."""
        return speed(lambda: self.training, self.plan, _predicted(self.plan))

    def recurrence_inputs(self) -> dict:
        """Return the types of the recurrence's inputs, which decide in which precision it runs."""
        from ... import kernels

        seen: dict[str, int] = {}

        def spy(backend: str, *tensors: Tensor | None, precision: str, **more: object) -> tuple[Tensor, Tensor]:
            types = " ".join(str(t.dtype).removeprefix("torch.") for t in tensors if t is not None)
            what = f"{backend} {precision}: {types}"
            seen[what] = seen.get(what, 0) + 1
            return original(backend, *tensors, precision=precision, **more)

        original = kernels.run
        with patch.object(kernels, "run", spy):
            take_step(self.training)
        return seen or {"calls": "none: no compiled backend ran"}

    def profile(self) -> dict:
        """Return the kernels of a step of one micro-batch by their time."""
        training = replace(self.training, batches=self.training.batches[:1])
        for _ in range(WARMUP):
            take_step(training)
        began = time.perf_counter()
        take_step(training)
        ms = 1000 * (time.perf_counter() - began)
        return {"tokens": training.tokens, "ms": ms} | kernels_of(lambda: take_step(training), self.plan.run.device)


def with_graphs(plan: StagePlan, wanted: bool) -> StagePlan:
    """Return a plan whose micro-batches run as CUDA graphs, or not; on a CPU there are none."""
    cuda_graphs = wanted and plan.run.device == "cuda"
    return replace(plan, settings=plan.settings.model_copy(update={"cuda_graphs": cuda_graphs}))


def compare_graphs(plan: StagePlan) -> dict:
    """Return how far the losses of a few steps by graphs are from those of steps without, on packed documents.

    Every step has documents of other lengths. On a CPU there are no graphs, and nothing differs.

    Args:
        plan: of the stage.
    """
    losses = []
    for one in (with_graphs(plan, True), with_graphs(plan, False)):
        torch.manual_seed(0)
        training = Case(one).training
        found = []
        for number in range(STEPS):
            batches = step_batches(one, one.length.seq_len * (60 + number) // 200, first=100 * number)  # four in a row
            found += take_step(replace(training, batches=batches)).losses
        losses.append(torch.tensor(found, dtype=torch.float64))
        del training
    graphed, wanted = losses
    worst = ((graphed - wanted) / wanted).abs().max().item()
    return {"worst": worst, "limit": GRAPHS_APART, "ok": worst <= GRAPHS_APART, "losses": wanted[-1].item()}


class FineTuning:
    """Cross-entropy of the teacher itself, the yardstick: the same engine, precision, batch and loop over the head.

    Args:
        plan: of a distill stage with the same rows, for its settings.
    """

    def __init__(self, plan: StagePlan):
        self.plan = plan

    @property
    def name(self) -> str:
        """Shape of the model and of a step."""
        return step_name(self.plan)

    def speed(self) -> dict:
        """Return speed and memory."""
        return speed(self._make, self.plan, {})

    def _make(self) -> Training:
        plan, run = self.plan, self.plan.run
        lm = random_teacher(run)
        engine = LocalEngine(lm, {"all": dict(lm.named_parameters())}, plan.optim, Distributed(run.device), "bf16")
        engine.set_rates({"all": plan.rates.lr_rest})
        shapes, second = meta_student(run), meta_online_teacher(plan)
        kind = plan.stage.prepare(shapes, plan, plan.phases[-1].train)
        forward = training_flops(shapes, plan, kind, second).forward["teacher"]
        return Training(plan, engine, FineTuningStep(), step_batches(plan), 3 * forward)


@dataclass(frozen=True)
class FineTuningStep:
    """Cross-entropy of a plain model.

    Attributes:
        loss: over chunks of the logits, as the project's own stages.
    """

    loss: NextTokenLoss = NextTokenLoss()

    def count(self, batch: Batch) -> int:
        """Return the labeled positions of a batch."""
        return batch.num_targets

    def __call__(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the cross-entropy."""
        hidden = model.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        ).last_hidden_state
        return self.loss.run(model.get_output_embeddings(), hidden, batch.targets)


def take_step(training: Training) -> StepResult:
    """Take an optimizer step; it is done when this returns."""
    batches, step = training.batches, training.step
    result = training.engine.train_step(batches, step, sum(map(step.count, batches)))
    synchronize(training.plan.run.device)
    return result


def speed(make: Callable[[], Training], plan: StagePlan, predicted: Mapping[str, int]) -> dict:
    """Return tokens per second, MFU and peak memory of optimizer steps.

    Args:
        make: models and optimizer; their memory counts.
        plan: of the stage.
        predicted: bytes by purpose.
    """
    cuda = plan.run.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    training = make()
    synchronize(plan.run.device)
    seconds = [time.perf_counter() - began]
    for _ in range(WARMUP + STEPS):
        began = time.perf_counter()
        result = take_step(training)
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds[-STEPS:])
    tokens_per_s = training.tokens / median
    peak, origin = peak_flops(torch.device(plan.run.device), plan.run.precision)
    numbers = {"tokens_per_s": tokens_per_s, "mfu": tokens_per_s * training.work / peak, "ms": 1000 * median}
    if cuda:
        numbers["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    memory = {name: size / GIB for name, size in predicted.items()}
    numbers |= {"predicted_gib": sum(memory.values())} if memory else {}
    return numbers | {
        "loss": result.loss,
        "finite": result.finite,
        "first_step_s": seconds[1],
        "build_s": seconds[0],
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB if cuda else 0,
        "gflop_per_token": training.work / 1e9,
        "peak_of": origin,
        "steps_ms": [1000 * s for s in seconds[1 + WARMUP :]],
        "predicted": memory,
    }


def _predicted(plan: StagePlan) -> dict[str, int]:
    """Return the bytes of a step by purpose, as `rwkvinside plan` shows them."""
    shapes = meta_student(plan.run)
    kind = plan.stage.prepare(shapes, plan, plan.phases[-1].train)
    teacher = meta_online_teacher(plan) if kind is TeacherKind.ONLINE else None
    return stage_memory(plan, shapes, kind, teacher).device


def step_batches(plan: StagePlan, document: int | None = None, first: int = 0) -> list[Batch]:
    """Return the micro-batches of a step, from a first seed on; see `random_batch`."""
    vocab, shape = (plan.run.teacher.config or {})["vocab_size"], plan.shape
    size = vocab, shape.micro_rows, plan.length.seq_len
    return [random_batch(*size, plan.run.device, document, first + i) for i in range(shape.micro_batches)]


def step_name(plan: StagePlan) -> str:
    """Return the shape of the teacher, and of a step: rows x tokens, and rows of a forward."""
    shape = plan.shape
    name = plan.run.teacher.path.rpartition("/")[2]
    return f"{name} {shape.rows}x{plan.length.seq_len} by {shape.micro_rows}"
