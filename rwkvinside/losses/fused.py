"""Losses whose logits one Triton kernel compares, whole chunks at a time and with their gradient in place.

What it computes is what the PyTorch code of these losses computes, which is its reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "torch"]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Comparison:
    """What the kernel computes at the positions of a chunk: kl * divergence + ce * cross-entropy.

    Attributes:
        teacher: (n, any number) logits of the teacher; None: there is only the cross-entropy.
        divergence: a name of `DIVERGENCES`.
        kl, ce: weights.
        temperature: of the divergence, by whose square it is multiplied.
    """

    teacher: Tensor | None = None
    divergence: str = "forward"
    kl: float = 0.0
    ce: float = 1.0
    temperature: float = 1.0

    def why_not(self, logits: Tensor) -> str | None:
        """Return why the kernel does not take such logits of a student, None if it does; its device aside."""
        for x in (logits,) if self.teacher is None else (logits, self.teacher):
            if x.dtype not in DTYPES:
                return f"it computes in fp32 and was given {x.dtype}"
            if x.stride(1) != 1:
                return "it reads logits with contiguous columns"
        return None

    def rows(self, logits: Tensor, labels: Tensor, need_grad: bool) -> Tensor:
        """Return loss and metrics of each position, (n, 2 or 4) fp32, by `compare_logits`.

        Args:
            logits: (n, V) of the student, which become the gradient where it is needed.
            labels: (n,) int64.
            need_grad: False: the logits stay as they are.
        """
        from ..kernels.gpu.losses import compare_logits  # needs triton

        how = {"kind": self.divergence, "kl": self.kl, "ce": self.ce, "temperature": self.temperature}
        rows = compare_logits(logits, labels, self.teacher, **how, need_grad=need_grad)
        if need_grad:
            torch.autograd.graph.increment_version(logits)  # so that a head whose backward needs them raises
        return rows


def fused_form(backend: Backend, comparison: Comparison | None, logits: Tensor) -> Comparison | None:
    """Return the comparison if the kernel is to compute it from these logits; None: PyTorch code is.

    Raises:
        RuntimeError: the backend is "triton" by name, and it cannot run.
    """
    if backend == "torch" or backend == "auto" and logits.device.type != "cuda":
        return None
    from ..kernels import why_unavailable

    why = why_unavailable("triton")
    if why is None:
        why = "it compares all logits of both models" if comparison is None else comparison.why_not(logits)
    if why is not None and backend == "triton":
        raise RuntimeError(f"the loss cannot run in Triton: {why}")
    return comparison if why is None else None
