"""Steps of align and distill on the Triton kernels, in every family and under autocast. Run by
test_training_steps.py, or directly:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/training_cases.py
"""

import contextlib

import pytest
import torch
from cases import pairwise
from hybrid_cases import packed, teacher
from torch.utils._python_dispatch import TorchDispatchMode

from rwkvinside.hybrid.calibration import teacher_norms
from rwkvinside.hybrid.model import HybridModel
from rwkvinside.hybrid.settings import StudentConfig
from rwkvinside.kernels.gpu import kernels
from rwkvinside.stages.steps import AlignStep, DistillStep
from rwkvinside.teacher.signals import OnlineTeacher, TeacherModel

DEVICE = "cpu" if kernels.INTERPRETED.value else "cuda"


class Recurrences(TorchDispatchMode):
    """Notes (mode, dtypes of r, w, k, v, a, b) of every forward of the recurrence."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.rwkvinside.wkv7_triton.default:
            self.seen.append((args[9], [x.dtype for x in args[:6]]))
        return function(*args, **kwargs or {})


def step_of(objective, family, backend):
    """The loss of a student with one layer of attention, and the gradients of its mixers."""
    student = HybridModel.from_teacher(teacher(family), StudentConfig(backend=backend, attention_layers=(1,)))
    student.to(DEVICE).set_trainable(["mixer"])
    batch = packed([17, 6]).to(DEVICE)
    if objective == "align":
        step = AlignStep(teacher_norms(student, [batch])[0])
    else:
        step = DistillStep(OnlineTeacher(TeacherModel(teacher(family).to(DEVICE))))
        student.release_teacher()
    loss = step(student, batch)[0]
    trained = [p for p in student.parameters() if p.requires_grad]
    return loss, torch.autograd.grad(loss, trained, allow_unused=True)


@pytest.mark.parametrize(
    "objective, family, bf16", pairwise(["align", "distill"], ["llama", "qwen2", "qwen3"], [False, True])
)
def test_the_dtype_of_the_products_chooses_the_kernels(objective, family, bf16):
    """The residual stream, norms and rotations stay fp32 under autocast; the recurrence must not follow them."""
    context = torch.autocast(DEVICE, torch.bfloat16) if bf16 else contextlib.nullcontext()
    with context, Recurrences() as recurrences:
        loss, gradients = step_of(objective, family, "triton")
    low = torch.bfloat16 if bf16 else torch.float32
    dtypes = [low, torch.float32, *[low] * 4]
    calls = 4 if objective == "align" else 2  # of two layers, which align computes again in the backward
    assert recurrences.seen == [("balanced" if bf16 else "fp32", dtypes)] * calls
    wanted, expected = step_of(objective, family, "reference")  # without autocast
    assert loss.item() == pytest.approx(wanted.item(), rel=3e-2 if bf16 else 1e-5)
    norm = torch.stack([g.norm() for g in expected if g is not None]).norm()
    error = torch.stack([(x - y).norm() for x, y in zip(gradients, expected, strict=True) if y is not None]).norm()
    assert error <= (6e-2 if bf16 else 1e-4) * norm
