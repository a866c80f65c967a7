"""Rows that go on from step to step compute what whole documents compute, and leave nothing else behind."""

import numpy as np
import pytest
import torch
from hybrid_cases import VOCAB, batch_of, logits, teacher
from stores import token_store

from rwkvinside.data.rows import ContinuedRows, PackedRows, PaddedDocuments
from rwkvinside.evaluate.in_training import evaluate_student
from rwkvinside.hybrid.lm_head import Logits
from rwkvinside.hybrid.model import HybridModel
from rwkvinside.hybrid.row_states import RowStates, row_bytes, unbounded_layers
from rwkvinside.hybrid.settings import StudentConfig

KEPT = {"attention_window": 6, "attention_sinks": 1, "attention_log_base": 8.0}
STUDENTS = {
    "x070": ((), {"preset": "x070"}),
    "cxa079": ((), {}),
    "rotating, with a window beside": ((), {"preset": "hxa079", "window": 5, "sinks": 2}),
    "with attention cut to a window": ((0, 2), KEPT),
}
STREAMS = 3


def student(name, dtype=torch.float64):
    attention_layers, spec = STUDENTS[name]
    config = StudentConfig(**spec, attention_layers=(0,)).model_copy(update={"attention_layers": attention_layers})
    lm = teacher("llama", num_key_value_heads=4) if spec.get("preset") == "x070" else teacher()
    model = HybridModel.from_teacher(lm, config).to(dtype).eval()
    for mixer in model.mixers.values():
        for parameter in mixer.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def rows():
    draw = np.random.default_rng(1)
    texts = [draw.integers(3, VOCAB, n).astype(np.uint32) for n in (41, 3, 70, 9, 17, 1, 55, 26)]
    store = token_store(texts, VOCAB - 1)
    return ContinuedRows(PackedRows(store, seq_len=12, seed=2), STREAMS, run_on=True)


def carry(states, model, batch):
    carried = states.enter(batch)
    result = model(batch, mode="student", task=Logits(), carried=carried)
    states.leave(batch, carried)
    return result


@pytest.mark.parametrize("micro_rows", [1, 3])
@pytest.mark.parametrize("name", STUDENTS)
def test_a_document_in_rows_equals_the_document_whole(rows, name, micro_rows):
    model, ran_on = student(name), 0
    states = RowStates(model, STREAMS)
    for step in range(rows.stretch + 2):  # beyond a lap
        for begin in range(0, STREAMS, micro_rows):
            batch = rows.batch(range(STREAMS * step + begin, STREAMS * step + begin + micro_rows))
            found = carry(states, model, batch).detach()
            for row, got in zip(batch.rows, found, strict=True):
                at = 0
                for number, (document, start, stop) in enumerate(rows.pieces(row)):
                    text = rows.packed.tokens.piece(document, 0, 1000)[0]
                    # tokens of it that the stream has read in the rows before this one
                    read = 0 if number else int(rows.row(row)["position_ids"][0])
                    whole = batch_of(torch.from_numpy(text[start - read : stop])[None])
                    size = min(stop, len(text)) - start
                    expected = logits(model, whole, "student")[0, read:]
                    torch.testing.assert_close(got[at : at + size], expected, rtol=0, atol=1e-10)
                    at, ran_on = at + size, ran_on + (read > 0)
    assert ran_on > 12


def test_a_step_may_run_again_and_counts_once(rows):
    model = student("x070")
    states = RowStates(model, STREAMS)
    for step in range(3):
        batch = rows.batch(range(STREAMS * step, STREAMS * step + STREAMS))
        once = carry(states, model, batch)
        idle = carry(states, model, rows.batch([batch.rows[-1]]))
        torch.testing.assert_close(idle[0], once[-1])
        torch.testing.assert_close(carry(states, model, batch), once, rtol=0, atol=0)


@pytest.mark.parametrize("name", STUDENTS)
def test_states_go_on_from_their_tensors_bit_for_bit(rows, name):
    model = student(name, torch.float32)
    states, again = RowStates(model, STREAMS), RowStates(model, STREAMS)
    for step in range(3):
        carry(states, model, rows.batch(range(STREAMS * step, STREAMS * step + STREAMS)))
    tensors = states.tensors(range(STREAMS))
    assert all(len(x) == STREAMS and not x.requires_grad for x in tensors.values())
    assert sum(x.nbytes for x in tensors.values()) == STREAMS * row_bytes(model)
    again.load(tensors)
    batch = rows.batch(range(3 * STREAMS, 4 * STREAMS))
    assert batch.goes_on.any()
    assert torch.equal(carry(again, model, batch), carry(states, model, batch))
    one_by_one = RowStates(model, STREAMS)  # other micro-batches, as after a resume on other ranks
    one_by_one.load(tensors)
    for i, row in enumerate(batch.rows):
        alone = carry(one_by_one, model, rows.batch([row]))
        torch.testing.assert_close(alone[0], carry(states, model, batch)[i])


def test_rows_that_go_on_are_scored_as_whole_documents(rows):
    model = student("with attention cut to a window", torch.float32)
    one = ContinuedRows(rows.packed, streams=1, run_on=True)
    in_order = [one.batch([i]) for i in range(one.rows_per_epoch)]
    lengths = [len(rows.packed.tokens.piece(i, 0, 1000)[0]) for i in range(rows.packed.tokens.num_documents)]
    whole = PaddedDocuments(rows.packed.tokens, max(lengths))
    alone = [whole.batch([i]) for i in range(len(whole)) if lengths[i] > 1]
    cpu = torch.device("cpu")
    expected = evaluate_student(model, None, alone, cpu).ce
    anew = evaluate_student(model, None, in_order, cpu).ce
    found = evaluate_student(model, None, in_order, cpu, states=RowStates(model, streams=1)).ce
    assert found == pytest.approx(expected, abs=1e-6) and abs(found - anew) > 1e-3


@pytest.mark.parametrize("what", ["layers", "recurrence"])
def test_recomputed_layers_leave_the_same_states_and_gradients(rows, what):
    found = []
    for recompute in (None, what):
        model = student("with attention cut to a window", torch.float32)
        model.set_trainable([".*"])
        model.recompute(recompute)
        states = RowStates(model, STREAMS)
        for step in range(3):
            batch = rows.batch(range(STREAMS * step, STREAMS * step + STREAMS))
            carry(states, model, batch).square().mean().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append(gradients | states.tensors(range(STREAMS)))
    plain, recomputed = found
    assert plain.keys() == recomputed.keys() and len(plain) > 40
    for name, x in plain.items():
        torch.testing.assert_close(recomputed[name], x, msg=name)


def test_layers_whose_state_would_grow_are_named():
    model = HybridModel.from_teacher(teacher(), StudentConfig(attention_layers=(0, 2)))
    assert unbounded_layers(model) == [0, 2] and unbounded_layers(student("with attention cut to a window")) == []
