"""The Triton kernels of the losses: in the interpreter, on a GPU, and where it does not run."""

import pytest
import torch
from head_problem import distill, problem
from triton_worker import run_cases

from rwkvinside.data.batch import Targets
from rwkvinside.hybrid.lm_head import LMHeadLoss
from rwkvinside.losses.fused import fused_form
from rwkvinside.losses.next_token import NextTokenLoss


@pytest.mark.integration
def test_losses_in_the_interpreter():
    run_cases("loss_cases.py", "squared_error_cases.py", interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_losses_on_a_gpu():
    run_cases("loss_cases.py", "squared_error_cases.py", interpret=False)


def test_a_machine_without_triton_trains_on_its_cpu(monkeypatch):
    def missing(backend):
        return "the package triton is not installed: pip install triton"

    monkeypatch.setattr("rwkvinside.kernels.why_unavailable", missing)
    hidden, head, labels, *teacher = problem()
    assert fused_form("auto", NextTokenLoss().comparison(None), torch.empty(2, 97)) is None
    assert distill(hidden, head, labels, teacher)[0] > 0
    for run in (
        lambda: distill(hidden, head, labels, teacher, backend="triton"),
        lambda: LMHeadLoss(head)(hidden, Targets.of(labels), NextTokenLoss(backend="triton")),
    ):
        with pytest.raises(RuntimeError, match="triton is not installed"):
            run()
