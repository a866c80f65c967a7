"""Steps against the same loss from all logits at once, values and gradients; more of distill and align: test_model."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hybrid_cases import logits, packed, teacher

from rwkvinside.hybrid.model import HybridModel
from rwkvinside.hybrid.settings import StudentConfig
from rwkvinside.losses.alignment import alignment_loss
from rwkvinside.losses.next_token import NextTokenLoss
from rwkvinside.losses.settings import DistillLossConfig
from rwkvinside.stages.steps import AlignStep, DistillStep, SftStep
from rwkvinside.teacher.signals import OnlineTeacher, SelfTeacher, TeacherModel


def student():
    hybrid = HybridModel.from_teacher(teacher(), StudentConfig(attention_layers=(1,))).double()
    hybrid.set_trainable(["mixer", "mlp", "head"])
    return hybrid


def gradients(hybrid, loss):
    parameters = [p for p in hybrid.canonical_parameters().values() if p.requires_grad]
    return torch.autograd.grad(loss, parameters)


def close(hybrid, loss, expected):
    assert loss.item() == pytest.approx(expected.item(), rel=1e-13)
    for got, want in zip(gradients(hybrid, loss), gradients(hybrid, expected), strict=True):
        assert (got - want).norm() <= 1e-11 * want.norm()


def test_sft_is_the_cross_entropy_of_the_labels():
    hybrid, batch = student(), packed([8, 5], rows=2)
    batch = replace(batch, labels=batch.labels.index_fill(1, torch.arange(4), -100))
    step = SftStep(NextTokenLoss(chunk_tokens=3))
    loss, metrics = step(hybrid, batch)
    expected = F.cross_entropy(logits(hybrid, batch, "student").flatten(0, 1), batch.labels.flatten(), reduction="sum")
    assert step.count(batch) == int((batch.labels != -100).sum()) and metrics["ce"].item() == loss.item()
    close(hybrid, loss, expected)


@pytest.mark.parametrize("online", [False, True])
def test_distill_is_the_divergence_from_the_teacher(online):
    hybrid, batch = student(), packed([8, 5], rows=2)
    its = OnlineTeacher(TeacherModel(teacher().double())) if online else SelfTeacher()
    loss, metrics = DistillStep(its, DistillLossConfig(ce=0.2, chunk_tokens=3))(hybrid, batch)
    labeled = batch.labels != -100
    log_q = logits(hybrid, batch, "student")[labeled].log_softmax(-1)
    log_p = logits(hybrid, batch, "teacher")[labeled].log_softmax(-1)
    kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    close(hybrid, loss, kl + 0.2 * F.nll_loss(log_q, batch.labels[labeled], reduction="sum"))
    assert metrics["kl"].item() == pytest.approx(kl.item(), rel=1e-13)


def test_align_divides_each_layers_error_by_its_norm():
    hybrid, batch = student(), packed([8, 5], rows=2)
    hybrid.set_trainable(["mixer"])
    norms = {0: 2.0, 2: 0.5}
    loss, metrics = AlignStep(norms)(hybrid, batch)
    errors = hybrid(batch, mode="align")
    assert loss.item() == pytest.approx((errors[0][0] / 2 + errors[2][0] * 2).item() / 2, rel=1e-6)  # sums are fp32
    assert metrics["layers"].tolist() == pytest.approx([errors[0][0].item() / 2, errors[2][0].item() * 2], rel=1e-6)
    assert torch.equal(loss, alignment_loss(errors, torch.tensor([2.0, 0.5]))[0])
