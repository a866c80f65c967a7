"""Teachers and what they say of a batch: the same distributions from every source, however they are cut."""

import pytest
import torch
from hybrid_cases import VOCAB, logits, packed, teacher

from rwkvinside.hybrid.model import HybridModel
from rwkvinside.hybrid.settings import StudentConfig
from rwkvinside.teacher.signals import HeadSignal, OnlineTeacher, SelfTeacher, StoredSignal, TeacherModel


def distributions(signal, size, vocab=VOCAB, temperature=1.0):
    """Those of all positions, two positions of a chunk at a time."""
    parts = [
        chunk.distribution(slice(start, start + 2), vocab, temperature)
        for chunk in signal.chunks(size)
        for start in range(0, size, 2)
    ]
    return torch.cat([part.log_probs for part in parts]), torch.cat([part.best for part in parts])


@pytest.mark.parametrize("source", ["self", "online"])
def test_a_teacher_in_memory_says_what_its_logits_say(source):
    student = HybridModel.from_teacher(teacher(), StudentConfig(attention_layers=(1,))).double()
    batch = packed([8, 5], rows=2)
    its = SelfTeacher() if source == "self" else OnlineTeacher(TeacherModel(teacher().double()))
    expected = logits(student, batch, "teacher")[batch.labels != -100]
    signal = its.signal(student, batch)
    assert not signal.hidden.requires_grad
    for size in (1, 6, 100):
        for vocab, temperature in ((VOCAB, 1.0), (VOCAB + 9, 2.0), (VOCAB - 10, 0.7)):
            log_probs, best = distributions(signal, size, vocab, temperature)
            want = expected[:, :vocab] / temperature
            assert torch.allclose(log_probs, want.log_softmax(-1), atol=1e-13)
            assert torch.equal(best, want.argmax(-1)) and not log_probs.requires_grad


def test_a_self_teacher_is_asked_without_adapters():
    """The base layer is the head that mode "teacher" runs."""

    class Adapted(torch.nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer, self.out_features = base_layer, base_layer.out_features

        def forward(self, x):
            return 2 * self.base_layer(x)

    student = HybridModel.from_teacher(teacher(), StudentConfig())
    base = student.teacher_head
    student.lm_head_loss.head = Adapted(base)
    batch = packed([8])
    assert student.teacher_head is base and SelfTeacher().signal(student, batch).head is base
    assert torch.equal(logits(student, batch, "teacher"), 2 * base(student(batch, mode="teacher")))


def test_stored_distributions_are_normalized_again_and_cut_where_they_are_asked():
    torch.manual_seed(0)
    exact = torch.randn(9, 5, dtype=torch.float64).log_softmax(-1)
    ids = torch.stack([torch.randperm(40)[:4] for _ in range(9)]).int()
    signal = StoredSignal(ids, exact.half(), 40)
    for size in (1, 4, 100):
        log_probs, best = distributions(signal, size)
        assert torch.allclose(log_probs.exp().sum(-1), torch.ones(9), atol=1e-6)
        assert torch.allclose(log_probs, exact.float(), atol=5e-3) and torch.equal(best, ids[:, 0].long())


def test_a_batch_without_a_label_has_one_empty_chunk():
    head = torch.nn.Linear(6, VOCAB)
    for signal in (HeadSignal(torch.zeros(0, 6), head), StoredSignal(torch.zeros(0, 4).int(), torch.zeros(0, 5), 40)):
        (chunk,) = signal.chunks(8)
        found = chunk.distribution(slice(0, 8), VOCAB, 1.0)
        assert len(found.log_probs) == len(found.best) == 0
