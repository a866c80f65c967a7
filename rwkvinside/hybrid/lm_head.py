"""Everything between final hidden states and logits.

A module that runs a loss on them, and gradients through any head, a chunk of tokens at a time and without keeping
logits for a backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HeadTask(Protocol):
    """What is computed by the head: a loss, scores, logits.

    Its fields are plain data.
    """

    def run(self, head: nn.Module, hidden: Tensor, labels: Tensor):
        """Return the task's result.

        Args:
            head: (..., D) -> (..., V), with `out_features` = V; to be called by `head.forward`, see `LMHeadLoss`.
            hidden: (B, T, D) final hidden states.
            labels: (B, T), already shifted; positions with -100 count nowhere.
        """
        ...


@dataclass(frozen=True)
class Logits:
    """All logits of a small batch at once, (B, T, V)."""

    def run(self, head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return the logits."""
        return head.forward(hidden)


class LMHeadLoss(nn.Module):
    """The end of the model's forward: a loss, or another `HeadTask`.

    It owns no weights; its child is the model's head, whose parameters keep their names. To ZeRO 3 it is a leaf: the
    head's weights stay gathered for the whole task, however many chunks that has on this rank. So tasks call
    `head.forward`: hooks of the head itself would gather and release for every chunk.
    """

    _z3_leaf = True  # read by DeepSpeed

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor, labels: Tensor, task: HeadTask):
        """Return the result of the task; arguments as of `HeadTask.run`."""
        return task.run(self.head, hidden, labels)


def logits_function(head: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the function (tokens, D) -> logits (tokens, V) for many chunks.

    It gives no gradients of the head's weights, which must be gathered as long as it is used.
    """
    return LinearHead(head).forward if type(head) is nn.Linear else head.forward


def open_head(head: nn.Module) -> LinearHead | AnyHead:
    """Return a head ready for a loop over chunks with gradients.

    Args:
        head: (tokens, D) -> (tokens, V), with `out_features` = V.
    """
    return LinearHead(head) if type(head) is nn.Linear else AnyHead(head)


class LinearHead:
    """A plain linear head by its matrix products.

    They add gradients of its large weight up in place. Under autocast the weight is cast once for all chunks. Gradients
    add up in fp32, in fp64 for fp64 weights.

    Attributes:
        out_features: V, the size of the vocabulary.
        parameters: those that train.
        gradients: of `parameters`, what `backward` has added up; empty before.
    """

    def __init__(self, head: nn.Linear):
        self.out_features = head.out_features
        device = head.weight.device.type
        mixed = torch.is_autocast_enabled(device) and head.weight.dtype != torch.float64
        self._dtype = torch.get_autocast_dtype(device) if mixed else head.weight.dtype
        self._weight = head.weight.detach().to(self._dtype)
        self._bias = None if head.bias is None else head.bias.detach().to(self._dtype)
        self._is_bias = [p is head.bias for p in head.parameters() if p.requires_grad]
        self.parameters = [p for p in head.parameters() if p.requires_grad]
        self.gradients: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (tokens, V) of x (tokens, D), which `backward` refers to."""
        self._x = x.to(self._dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(self._x, self._weight, self._bias)

    def backward(self, grad: Tensor, inputs: bool) -> Tensor | None:
        """Add to `gradients`, and return the gradient of `x` where it is needed.

        Args:
            grad: gradient of the logits of the last `forward`.
            inputs: whether the gradient of `x` is needed.
        """
        if not self.gradients:
            self.gradients = [torch.zeros_like(p, dtype=wide(p.dtype)) for p in self.parameters]
        low = grad.to(self._dtype)
        for total, is_bias in zip(self.gradients, self._is_bias, strict=True):
            if is_bias:
                total += grad.sum(0)
            elif total.dtype == low.dtype:
                total.addmm_(low.t(), self._x)
            else:
                total += low.t() @ self._x
        return low @ self._weight if inputs else None


class AnyHead:
    """A head of any kind (quantized, with adapters) by autograd; used as `LinearHead`."""

    def __init__(self, head: nn.Module):
        self._head = head
        self.out_features: int = head.out_features
        self.parameters = [p for p in head.parameters() if p.requires_grad]
        self.gradients: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, see `LinearHead.forward`."""
        self._x = x.detach().requires_grad_()
        with torch.enable_grad():
            logits = self._head.forward(self._x)
        self._dtype, self._edge = logits.dtype, torch.autograd.graph.get_gradient_edge(logits)
        return logits.detach()

    def backward(self, grad: Tensor, inputs: bool) -> Tensor | None:
        """Add to `gradients`, see `LinearHead.backward`."""
        leaves = [self._x] * inputs + self.parameters
        if not leaves:
            return None
        with torch.autocast(grad.device.type, enabled=False):  # types are those of the forward
            grads = list(torch.autograd.grad(self._edge, leaves, grad.to(self._dtype)))
        of_inputs = grads.pop(0) if inputs else None
        grads = [new.to(wide(new.dtype)) for new in grads]
        self.gradients = [a + b for a, b in zip(self.gradients, grads, strict=True)] if self.gradients else grads
        return of_inputs


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compare logits and add gradients up in: fp32, of fp64 fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
