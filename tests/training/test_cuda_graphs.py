"""Micro-batches by graphs, with a stand-in that replays what a capture has recorded, operation by operation.

What it replays is fixed as a CUDA graph is: had the host decided anything by a batch, by the number of a step or by
what the loss is divided by, later steps would be those of the recorded batch. It refuses what waits for the device.
"""

import contextlib
import weakref
from dataclasses import replace

import pytest
import torch
from graphed_training import LENGTH, STEPS, batch, take_step, trained, training
from recorded_graph import Recorder

from rwkvinside.errors import UserError
from rwkvinside.hybrid import document_attention
from rwkvinside.losses import chunked
from rwkvinside.modeling import time_mixer
from rwkvinside.modeling import wkv7 as wkv7_file
from rwkvinside.modeling.wkv7 import wkv7
from rwkvinside.training.cuda_graphs import MOST, WARM_RUNS, CudaRecorder, MicroBatchGraphs, Sums


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
    monkeypatch.setattr(wkv7_file, "_check_decay", lambda *_: None)  # on a GPU no value is looked at


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


def sums(batch, step, scale):
    """A micro-batch's work, without a model."""
    return Sums(torch.stack([batch.input_ids.sum() * scale]), {})


def test_a_few_shapes_have_graphs_at_a_time_and_padding_has_none():
    recorder = Recorder()
    graphs = MicroBatchGraphs(sums, recorder)
    step = object()

    def run(rows, seed=0, scale=1.0):
        given = batch(seed, rows, False)
        found = graphs(given, step, torch.tensor(scale))
        assert found.row == given.input_ids.sum() * scale
        return found

    for seed in range(WARM_RUNS + 2):
        run(1, seed, 1 + seed)
    assert [graph.replays for graph in recorder.graphs] == [2]
    for rows in range(2, 2 + MOST):  # so many shapes that the first one is forgotten
        run(rows)
    run(1)
    assert len(recorder.graphs) == 1
    for _ in range(WARM_RUNS):
        run(1)
    assert len(recorder.graphs) == 2
    padded = replace(batch(5, 1, False), segment_ids=torch.tensor([[1] * (LENGTH - 1) + [0]], dtype=torch.int32))
    assert padded.fixed() is None
    graphs(padded, step, torch.tensor(1.0))
    run(1)  # the memory of the graphs was given back
    assert len(recorder.graphs) == 2


def test_what_cannot_be_recorded_runs_without_graphs_where_nobody_asked_for_them(caplog):
    recorder, asked = Recorder(), []

    def refuse(work):
        asked.append(work)
        raise UserError("a micro-batch cannot be recorded as a CUDA graph: no memory")

    recorder.record = refuse
    step, batches = object(), [batch(seed, 1, False) for seed in range(WARM_RUNS + 3)]
    graphs = MicroBatchGraphs(sums, recorder)
    with pytest.raises(UserError, match="no memory"):
        for given in batches:
            graphs(given, step, torch.tensor(1.0))
    asked.clear()
    recorder.required = False
    graphs = MicroBatchGraphs(sums, recorder)
    found = [graphs(given, step, torch.tensor(2.0)).row for given in batches]
    assert torch.cat(found).tolist() == [2 * given.input_ids.sum() for given in batches]
    assert len(asked) == 1
    assert caplog.messages == [
        "a micro-batch cannot be recorded as a CUDA graph: no memory; training goes on without graphs"
    ]


def test_what_a_failed_recording_has_made_is_gone_before_the_run_without_it():
    """Its memory may be what was missing, and the error's traceback would hold it."""
    recorder, alive = Recorder(), []

    class Activations:
        pass

    def refuse(work):
        made = Activations()
        alive.append(weakref.ref(made))
        try:
            raise RuntimeError("out of memory")
        except RuntimeError as error:
            raise UserError("a micro-batch cannot be recorded as a CUDA graph: no memory") from error

    def run(batch, step, scale):
        assert all(made() is None for made in alive)
        return sums(batch, step, scale)

    recorder.record, recorder.required = refuse, False
    graphs, step = MicroBatchGraphs(run, recorder), object()
    for seed in range(WARM_RUNS + 2):
        graphs(batch(seed, 1, False), step, torch.tensor(1.0))
    assert len(alive) == 1


def test_a_result_outlives_the_next_run():
    graphs, step = MicroBatchGraphs(sums, Recorder()), object()
    found = [graphs(batch(seed, 1, False), step, torch.tensor(1.0)).row for seed in range(WARM_RUNS + 3)]
    assert torch.cat(found).tolist() == [batch(seed, 1, False).input_ids.sum() for seed in range(WARM_RUNS + 3)]


def test_a_run_that_hooks_look_at_has_no_graph(as_on_a_gpu):
    """As in the search for what is not finite; steps after it begin with ordinary runs."""
    recorder = Recorder()
    engine, step = training("align", "llama", False, recorder)
    for number in range(2):
        take_step(engine, step, number, False)
    seen, before = [], len(recorder.graphs)
    assert before == 1
    engine.model.lm.model.norm.register_forward_hook(lambda *call: seen.append(call))
    engine.backward(batch(0, 2, False), step)
    assert len(seen) == 1
    take_step(engine, step, 2, False)
    assert len(seen) == 4 and len(recorder.graphs) == before
    take_step(engine, step, 3, False)
    assert len(recorder.graphs) > before


class FakeGraph:
    def pool(self):
        return id(self)

    def replay(self):
        pass


def test_graphs_share_the_memory_of_those_that_live(monkeypatch):
    """What a GPU is asked for; whether it does that is for a machine with one (tests/kernels/graph_cases.py)."""
    asked = []

    @contextlib.contextmanager
    def capture(graph, pool, stream):
        asked.append(pool)
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "current")
    recorder = CudaRecorder(torch.device("cuda"))
    one, other = (recorder.record(lambda: "result") for _ in range(2))
    assert asked == [None, one[0].__self__.pool()] and other[1] == "result"
    del one
    recorder.record(lambda: "result")
    assert asked[2] == other[0].__self__.pool()
    del other
    recorder.record(lambda: "result")
    assert asked[3] is None


def test_what_a_gpu_does_not_record_is_said_in_one_line(monkeypatch):
    """By the call that it refused, not by the end of the recording, which fails then, too."""

    @contextlib.contextmanager
    def capture(graph, pool, stream):
        try:
            yield
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def work():
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nSearch for it in the docs.")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "current")
    streams = []
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    with pytest.raises(UserError) as caught:
        CudaRecorder(torch.device("cuda")).record(work)
    assert streams == ["current"]
    assert caught.value.cause.endswith("CUDA graph: CUDA error: operation not permitted when stream is capturing")
    assert caught.value.hint == "set cuda_graphs of the stage to false"
