"""Losses of a micro-batch in bf16 by PyTorch code and by the Triton kernels: of distill, and of a layer in align."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ...data.batch import Targets
from ...hybrid.layer_error import squared_error
from ...hybrid.lm_head import LMHeadLoss
from ...kernels.gpu.launch import run
from ...kernels.gpu.losses import plan_compare
from ...kernels.gpu.squared_error import plan_error, plan_error_backward
from ...losses.chunked import chunk_tokens
from ...losses.distillation import DistillationLoss
from ...losses.fused import Backend
from ...losses.settings import DistillLossConfig
from ...teacher.signals import HeadSignal
from .profiling import kernels_of
from .timing import launch_milliseconds, milliseconds

BACKENDS: tuple[Backend, ...] = ("torch", "triton")
CASES = {"": DistillLossConfig(), "with ce at T 2: ": DistillLossConfig(ce=0.1, temperature=2.0)}


def compare_losses(tokens: int, vocab: int, width: int, device: str) -> dict:
    """Return the times of both, products of the heads included, and how far their results are apart.

    Differences are relative: of the loss, the largest of the metrics, and of the gradient of the hidden states in its
    norm. "launch_ms" is one launch of the kernel over a chunk, "launch_bytes_per_s" what it reads and writes.

    Args:
        tokens: with a label.
        vocab: of student and teacher.
        width: of the hidden states of both.
        device: "cuda" or "cpu".
    """
    case = Case(tokens, vocab, width, device)
    numbers: dict[str, float] = {}
    for name, config in CASES.items():
        (loss, sums, grad), (fused_loss, fused_sums, fused_grad) = (case.result(each, config) for each in BACKENDS)
        for backend in BACKENDS:
            numbers[f"{name}{backend}_ms"] = milliseconds(partial(case.result, backend, config), device, repeats=3)
        numbers[f"{name}loss_differs"] = _apart(loss, fused_loss)
        numbers[f"{name}metrics_differ"] = max(_apart(sums[key], fused_sums[key]) for key in sums)
        numbers[f"{name}gradient_differs"] = _apart(grad, fused_grad)
    return numbers | _launch(min(tokens, chunk_tokens(vocab, device)), vocab, device)


def _launch(rows: int, vocab: int, device: str) -> dict[str, float]:
    logits, teacher = (torch.randn(rows, vocab, device=device).bfloat16() for _ in range(2))
    launches, _ = plan_compare(logits, torch.zeros(rows, dtype=torch.int64, device=device), teacher, ce=0.0)
    ms = launch_milliseconds(partial(run, launches, torch.device(device)), device)
    # both are read twice, and the gradient is written
    return {"launch_ms": ms, "launch_bytes_per_s": 1e3 * 5 * logits.nbytes / ms}


def compare_errors(tokens: int, width: int, device: str) -> dict:
    """Return what the squared error of a layer costs by both, forward and backward, and how far they are apart.

    Differences are relative as in `compare_losses`. "forward_ms" and "backward_ms" are one launch of each kernel,
    "forward_bytes_per_s" and "backward_bytes_per_s" what it reads and writes.

    Args:
        tokens: of a micro-batch.
        width: of the layer's output.
        device: "cuda" or "cpu".
    """
    torch.manual_seed(0)
    output, target = (torch.randn(1, tokens, width, device=device).bfloat16() for _ in range(2))

    def result(backend: str) -> tuple[Tensor, Tensor]:
        x = output.detach().requires_grad_()
        error = squared_error(x, target, None, "chunked" if backend == "torch" else backend)
        return error.detach(), torch.autograd.grad(error, x)[0]

    (error, grad), (fused_error, fused_grad) = map(result, BACKENDS)
    numbers = {"error_differs": _apart(error, fused_error), "gradient_differs": _apart(grad, fused_grad)}
    for backend in BACKENDS:
        numbers[f"{backend}_ms"] = milliseconds(partial(result, backend), device)
        found = kernels_of(partial(result, backend), device)
        numbers |= {f"{backend}_kernels_ms": found["kernels_ms"], f"{backend}_launches": found["launches"]}
    forward, (_, difference) = plan_error(output, target, None, keep=True)
    backward, _ = plan_error_backward(difference, error)
    for name, launches, moved in (("forward", forward, 3), ("backward", backward, 2)):
        ms = launch_milliseconds(partial(run, launches, torch.device(device)), device)
        numbers |= {f"{name}_ms": ms, f"{name}_bytes_per_s": 1e3 * moved * output.nbytes / ms}
    return numbers


class Case:
    """Hidden states with a label each, and frozen heads of student and teacher, all random.

    Args:
        tokens, vocab, width, device: as in `compare_losses`.
    """

    def __init__(self, tokens: int, vocab: int, width: int, device: str):
        torch.manual_seed(0)
        student, teacher = (nn.Linear(width, vocab, bias=False, device=device).requires_grad_(False) for _ in range(2))
        teacher.weight.lerp_(student.weight, 0.8)
        self.device, self.head, self.teacher = device, LMHeadLoss(student), teacher
        self.hidden = 4 * torch.randn(1, tokens, width, device=device)
        self.targets = Targets.of(torch.randint(0, vocab, (1, tokens), device=device))

    def result(self, backend: Backend, config: DistillLossConfig) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Return loss, metrics and the gradient of the hidden states."""
        hidden = self.hidden.clone().requires_grad_()
        with torch.autocast(self.device, dtype=torch.bfloat16):
            signal = HeadSignal(self.hidden[0], self.teacher)
            loss, sums = self.head(hidden, self.targets, DistillationLoss(signal, config, backend))
        return loss.detach(), sums, torch.autograd.grad(loss, hidden)[0]


def _apart(x: Tensor, y: Tensor) -> float:
    return ((x - y).norm() / x.norm()).item()
