"""Scores within the model's forward, a chunk at a time, against the comparison of whole logits."""

from dataclasses import replace

import pytest
import torch
from hybrid_cases import VOCAB, logits, packed, teacher

from rwkvinside.errors import UserError
from rwkvinside.evaluate import in_training
from rwkvinside.evaluate.in_training import evaluate_student, share
from rwkvinside.evaluate.quality import compare
from rwkvinside.hybrid.model import HybridModel
from rwkvinside.hybrid.settings import StudentConfig
from rwkvinside.teacher.signals import OnlineTeacher, SelfTeacher, TeacherModel

CPU = torch.device("cpu")


def student():
    return HybridModel.from_teacher(teacher(), StudentConfig(attention_layers=(1,))).train()


@pytest.mark.parametrize("size", [3, 1000])
@pytest.mark.parametrize("source", ["self", "online", "wide"])
def test_scores_are_those_of_whole_logits(source, size, monkeypatch):
    """ "wide": a teacher whose vocabulary is padded further."""
    monkeypatch.setattr(in_training, "chunk_tokens", lambda vocab: size)
    model, batches = student(), [packed([9], rows=2, seed=1), packed([14], seed=2)]
    lm = teacher(vocab_size=VOCAB + 14) if source == "wide" else teacher()
    its = SelfTeacher() if source == "self" else OnlineTeacher(TeacherModel(lm))
    found = evaluate_student(model, its, batches, CPU)
    assert all(layer.training for layer in model.family.layers(model.lm)), "as it was"
    model.eval()
    expected = compare(
        lambda batch: logits(model, batch, "student"), lambda batch: lm(input_ids=batch.input_ids).logits, batches
    ).scores
    for name, value in expected.to_dict().items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-5), name
    assert found.kl > 0.01


def test_the_control_is_scored_in_the_students_place():
    model = HybridModel.from_teacher(teacher(), StudentConfig(window=4, sinks=1)).eval()
    batches = [packed([12], rows=2, seed=1), packed([9], seed=2)]
    found = evaluate_student(model, SelfTeacher(), batches, CPU, mode="control")
    expected = compare(lambda b: logits(model, b, "control"), lambda b: logits(model, b, "teacher"), batches).scores
    for name, value in expected.to_dict().items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-5), name
    assert found.kl > 0.01
    assert found.kl != evaluate_student(model, SelfTeacher(), batches, CPU).kl


def test_without_a_teacher_the_cross_entropy_is_the_students():
    model, batch = student(), packed([9], rows=2)
    with_one, without = (evaluate_student(model, its, [batch], CPU) for its in (SelfTeacher(), None))
    assert without.ce == without.ce_teacher == with_one.ce and without.kl == 0 and without.agreement == 1


def test_ranks_have_equally_many_batches_and_what_fills_up_counts_nowhere():
    model = student()
    batches = [packed([9], rows=2, seed=seed) for seed in (1, 2, 3)]
    own = [share(batches, rank, 2) for rank in (0, 1)]
    assert [len(part) for part in own] == [2, 2] and own[1][1].num_targets == 0
    sums = []

    def total(values):
        sums.append(torch.tensor(values, dtype=torch.float64))
        return values

    for part in own:
        evaluate_student(model, SelfTeacher(), part, CPU, total)
    whole = evaluate_student(model, SelfTeacher(), batches, CPU)
    count, kl, *_ = (sums[0] + sums[1]).tolist()
    assert count == whole.tokens and kl / count == pytest.approx(whole.kl, rel=1e-6)
    empty = replace(batches[0], labels=torch.full_like(batches[0].labels, -100))
    with pytest.raises(UserError, match="no token to predict"):
        evaluate_student(model, SelfTeacher(), [empty], CPU)
