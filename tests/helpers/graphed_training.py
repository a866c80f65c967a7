"""A few steps of tiny students, by graphs or without, over micro-batches that differ in all that no graph may fix."""

import torch
from hybrid_cases import VOCAB, teacher

from rwkvinside.data.batch import IGNORE, Batch
from rwkvinside.hybrid.calibration import teacher_norms
from rwkvinside.hybrid.model import HybridModel
from rwkvinside.hybrid.settings import StudentConfig
from rwkvinside.stages.steps import AlignStep, DistillStep
from rwkvinside.teacher.signals import OnlineTeacher, TeacherModel
from rwkvinside.training.local_engine import LocalEngine
from rwkvinside.training.process_group import Distributed
from rwkvinside.training.settings import OptimConfig

LENGTH, STEPS = 12, 3


def batch(seed, rows, packed):
    """Rows of random tokens; packed ones have documents of other lengths, and so other targets, for every seed."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (rows, LENGTH), generator=g)
    segments = torch.ones_like(ids, dtype=torch.int32)
    if packed:
        for row, count in enumerate([2 + seed % 2, 2][:rows]):
            segments[row, 1 + torch.randperm(LENGTH - 1, generator=g)[:count]] += 1
        segments = segments.sub(1).cumsum(1).add(1).int()
    place = torch.arange(LENGTH).expand_as(ids)
    starts = segments != segments.roll(1, 1)
    starts[:, 0] = True
    positions = place - place.where(starts, 0).cummax(1).values
    labels = ids.roll(-1, 1).masked_fill(starts.roll(-1, 1), IGNORE)
    return Batch(ids, labels, positions, segments, tuple(range(rows)))


def step_batches(number, packed):
    """Micro-batches of a step, the last of which is shorter."""
    return [batch(10 * number + i, rows, packed) for i, rows in enumerate((2, 2, 1))]


def training(objective, family, packed, recorder, precision="fp32", device="cpu", **spec):
    """An engine and its step."""
    student = HybridModel.from_teacher(teacher(family, layers=2), StudentConfig(**spec))
    student.set_trainable(["mixer"] if objective == "align" else ["mixer", "mlp", "embed", "head"])
    trainable = {id(p): (name, p) for name, p in student.canonical_parameters().items() if p.requires_grad}
    engine = LocalEngine(
        student, {"all": dict(trainable.values())}, OptimConfig(), Distributed(device), precision, recorder
    )
    if objective == "align":
        with engine.autocast():
            return engine, AlignStep(teacher_norms(student, [batch(0, 2, packed).to(device)])[0])
    student.release_teacher()
    return engine, DistillStep(OnlineTeacher(TeacherModel(teacher(family, layers=2).to(device))))


def take_step(engine, step, number, packed, device="cpu"):
    engine.set_rates({"all": 1e-2 / (1 + number)})
    batches = [one.to(device) for one in step_batches(number, packed)]
    return engine.train_step(batches, step, sum(map(step.count, batches)))


def trained(objective, family, packed, recorder, precision="fp32", device="cpu", **spec):
    """Losses, norms and weights of a few steps."""
    engine, step = training(objective, family, packed, recorder, precision, device, **spec)
    results = [take_step(engine, step, number, packed, device) for number in range(STEPS)]
    return results, engine.full_parameters()
