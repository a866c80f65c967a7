"""Memory and time of the distillation loss: all logits at once compared with a chunk of tokens at a time.

On a GPU a chunk is compared twice: by PyTorch code, and by the Triton kernel. Every case runs in separate processes, in
turns, so that a peak belongs to it alone. CPU, or the first GPU.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.batch import Targets
from ..hybrid.lm_head import LMHeadLoss
from ..losses.chunked import chunk_tokens
from ..losses.distillation import DistillationLoss
from ..losses.fused import Backend
from ..support.process_memory import forget_peak, peak_bytes
from ..teacher.signals import HeadSignal


@dataclass(frozen=True)
class Problem:
    """Random hidden states of student and teacher, and a head for each.

    Attributes:
        tokens: number of tokens with a label.
        vocab: rows of the heads.
        hidden: width of the heads.
        trained: whether the student's head gets a gradient too.
    """

    tokens: int
    vocab: int
    hidden: int
    trained: bool


def measure(kind: str, problem: Problem, threads: int) -> dict[str, float]:
    """Measure one forward and backward of KL(teacher || student) in this process.

    The process should be a new one.

    Args:
        kind: "whole", or "chunks" (PyTorch) or "fused" (Triton) of the logits.
        problem: what to compute.
        threads: of the CPU.

    Returns:
        "loss"; "norm" of the gradient of the hidden states; "seconds"; "bytes", the peak above the memory in use before
        and without the head's gradient, which every way of computing it leaves.
    """
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loss_of = {"whole": _whole, "chunks": partial(_chunks, "torch"), "fused": partial(_chunks, "triton")}[kind]
    # a small problem starts threads and libraries; a gradient of the whole head would count as memory in use before
    loss_of(*_case(Problem(8, 64, 16, problem.trained), device)).backward()
    hidden, student, *rest = _case(problem, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        forget_peak()
    before = _peak_bytes(device)
    start = time.perf_counter()
    loss = loss_of(hidden, student, *rest)
    loss.backward()
    norm = hidden.grad.norm().item()
    seconds = time.perf_counter() - start
    gradient = 0 if student.weight.grad is None else student.weight.grad.nbytes
    return {"loss": loss.item(), "norm": norm, "seconds": seconds, "bytes": _peak_bytes(device) - before - gradient}


def _case(problem: Problem, device: torch.device) -> tuple[Tensor, nn.Linear, Tensor, Tensor, nn.Linear]:
    """Return hidden states, head and labels of the student, then those of the teacher."""
    torch.manual_seed(0)
    student, teacher = (nn.Linear(problem.hidden, problem.vocab, bias=False, device=device) for _ in range(2))
    teacher.requires_grad_(False)
    student.requires_grad_(problem.trained)
    hidden, teacher_hidden = (4 * torch.randn(1, problem.tokens, problem.hidden, device=device) for _ in range(2))
    labels = torch.randint(0, problem.vocab, (1, problem.tokens), device=device)
    return hidden.requires_grad_(), student, labels, teacher_hidden, teacher


def _whole(hidden: Tensor, head: nn.Module, labels: Tensor, teacher_hidden: Tensor, teacher: nn.Module) -> Tensor:
    target = F.log_softmax(teacher(teacher_hidden), -1)
    return F.kl_div(F.log_softmax(head(hidden), -1), target, reduction="sum", log_target=True)


def _chunks(
    backend: Backend, hidden: Tensor, head: nn.Module, labels: Tensor, teacher_hidden: Tensor, teacher: nn.Module
) -> Tensor:
    loss = DistillationLoss(HeadSignal(teacher_hidden[0], teacher), backend=backend)
    return LMHeadLoss(head)(hidden, Targets.of(labels), loss)[0]


def _peak_bytes(device: torch.device) -> int:
    """Return the peak memory so far: of the process, or allocated on the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return peak_bytes()


def head_cost(problem: Problem, repeats: int = 3) -> dict:
    """Compare the ways of computing the loss, in new processes that take turns.

    Args:
        problem: what to compute.
        repeats: processes of each kind; medians are reported.

    Returns:
        {"whole": {...}, "chunks": {...}} as `measure` gives them, on a GPU "fused" too; "memory" and "time": chunks
        relative to the whole; "chunk_tokens", "threads", "device", and the fields of the problem.
    """
    threads = torch.get_num_threads()
    runs: dict[str, list[dict]] = {"whole": [], "chunks": []} | ({"fused": []} if torch.cuda.is_available() else {})
    context = multiprocessing.get_context("spawn")
    for _ in range(repeats):
        for kind, measured in runs.items():
            with context.Pool(1) as pool:
                measured.append(pool.apply(measure, (kind, problem, threads)))
    medians = {
        kind: {name: statistics.median(run[name] for run in measured) for name in measured[0]}
        for kind, measured in runs.items()
    }
    whole, chunks = medians["whole"], medians["chunks"]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    environment = {"chunk_tokens": chunk_tokens(problem.vocab, kind), "threads": threads, "device": device}
    ratios = {"memory": chunks["bytes"] / whole["bytes"], "time": chunks["seconds"] / whole["seconds"]}
    return medians | ratios | environment | asdict(problem)
