"""Micro-batches by graphs, with a stand-in that replays what a capture has recorded, operation by operation.

What it replays is fixed as a CUDA graph is: had the host decided anything by a batch, by the number of a step or by
what the loss is divided by, later steps would be those of the recorded batch. It refuses what waits for the device.
"""

import pytest
import torch
from hybrid_cases import VOCAB, teacher
from recorded_graph import Recorder

from rwkvinside.data.batch import IGNORE, Batch
from rwkvinside.hybrid import document_attention
from rwkvinside.hybrid.calibration import teacher_norms
from rwkvinside.hybrid.model import HybridModel
from rwkvinside.hybrid.settings import StudentConfig
from rwkvinside.losses import chunked
from rwkvinside.modeling import time_mixer
from rwkvinside.modeling.wkv7 import wkv7
from rwkvinside.stages.steps import AlignStep, DistillStep
from rwkvinside.teacher.signals import OnlineTeacher, TeacherModel
from rwkvinside.training.local_engine import LocalEngine
from rwkvinside.training.process_group import Distributed
from rwkvinside.training.settings import OptimConfig

LENGTH, STEPS = 12, 4


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


class Rows:
    """What the Triton kernel of the loss gives, for the KL divergence alone."""

    def __init__(self, comparison):
        self.teacher = comparison.teacher

    def rows(self, logits, labels, need_grad):
        log_p, log_q = self.teacher.float().log_softmax(-1), logits.float().log_softmax(-1)
        ce = -log_q.gather(-1, labels[:, None])[:, 0]
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        agreement = (log_p.argmax(-1) == log_q.argmax(-1)).float()
        if need_grad:
            logits.copy_(log_q.exp() - log_p.exp())
        return torch.stack([kl, ce, kl, agreement], -1)


def flash(query, key, value, documents, form):
    """Attention within documents that reads their bounds on the device, as flash attention does."""
    index = torch.arange(len(query))
    document = torch.searchsorted(documents.cu_seqlens.long(), index, right=True)
    seen = (document[:, None] == document) & (index <= index[:, None])
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, v, attn_mask=seen, scale=form.scaling).transpose(0, 1)


def recurrence(r, log_decay, k, v, a, b, state=None, *, cu_seqlens, **options):
    """`wkv7`, which on a CPU asks bounds of documents for their values."""
    if cu_seqlens is None:
        return wkv7(r, log_decay, k, v, a, b, state, **options)
    at = torch.arange(r.shape[1])
    goes_on = (at > cu_seqlens.long()[torch.searchsorted(cu_seqlens.long(), at, right=True) - 1]).float()
    k, v, a, b = (x.repeat_interleave(r.shape[2] // x.shape[2], 2) for x in (k, v, a, b))
    S, ys = torch.zeros(*r.shape[2:], r.shape[3]), []
    for i, (rt, wt, kt, vt, at, bt) in enumerate(
        zip(*(x[0].float().unbind() for x in (r, log_decay, k, v, a, b)), strict=True)
    ):
        S = S * goes_on[i]
        S = S * wt.exp()[:, None] + (S @ at[..., None]) * bt[:, None] + vt[..., None] * kt[:, None]
        ys.append((S @ rt[..., None])[..., 0])
    return torch.stack(ys)[None].to(v.dtype), S


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(chunked, "fused_form", lambda backend, comparison, logits: Rows(comparison))
    monkeypatch.setattr(document_attention, "_flash_dtype", lambda query: query.dtype)
    monkeypatch.setattr(document_attention, "_flash", flash)
    monkeypatch.setattr(time_mixer, "wkv7", recurrence)


def trained(objective, family, packed, recorder, precision="fp32", **spec):
    """Losses, norms and weights of a few steps."""
    student = HybridModel.from_teacher(teacher(family, layers=2), StudentConfig(**spec))
    student.set_trainable(["mixer"] if objective == "align" else ["mixer", "mlp", "embed", "head"])
    trainable = {id(p): (name, p) for name, p in student.canonical_parameters().items() if p.requires_grad}
    engine = LocalEngine(
        student, {"all": dict(trainable.values())}, OptimConfig(), Distributed("cpu"), precision, recorder
    )
    if objective == "align":
        with engine.autocast():
            step = AlignStep(teacher_norms(student, [batch(0, 2, packed)])[0])
    else:
        step = DistillStep(OnlineTeacher(TeacherModel(teacher(family, layers=2))))
        student.release_teacher()
    results = []
    for number in range(STEPS):
        engine.set_rates({"all": 1e-2 / (1 + number)})
        batches = step_batches(number, packed)
        results.append(engine.train_step(batches, step, sum(map(step.count, batches))))
    return results, engine.full_parameters()


CASES = [
    ("align", "llama", False, {}),
    ("align", "qwen3", True, {"window": 3, "sinks": 1}),
    ("align", "qwen3", False, {"precision": "bf16"}),
    ("distill", "qwen3", False, {}),
    ("distill", "llama", True, {"window": 3, "attention_layers": (1,)}),
    ("distill", "qwen3", True, {"precision": "bf16"}),
]


@pytest.mark.parametrize("objective, family, packed, options", CASES)
def test_steps_are_those_without_graphs(objective, family, packed, options, as_on_a_gpu):
    recorder = Recorder()
    wanted, weights = trained(objective, family, packed, None, **options)
    found, same = trained(objective, family, packed, recorder, **options)
    assert sum(graph.replays for graph in recorder.graphs) >= STEPS
    assert found == wanted
    assert all(torch.equal(x, same[name]) for name, x in weights.items())
