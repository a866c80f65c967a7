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

from ..data.batch import Targets
from ..families.base import LogitShape

PLAIN = LogitShape()  # logits are the head's output


class ShapedHead:
    """A head together with what its model makes of its output; used as the head itself.

    Args:
        head: (..., D) -> (..., V), with `out_features` = V.
        shape: the family's.
    """

    def __init__(self, head: nn.Module, shape: LogitShape):
        self.head, self.shape = head, shape
        self.out_features: int = head.out_features

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the model's logits (..., V)."""
        return shape_logits(self.head.forward(hidden), self.shape)


Head = nn.Module | ShapedHead


def shaped(head: nn.Module, shape: LogitShape) -> Head:
    """Return a head whose logits are the model's: itself where these are its output."""
    return head if shape == PLAIN else ShapedHead(head, shape)


def shape_logits(x: Tensor, shape: LogitShape) -> Tensor:
    """Return the logits of a head's output, as the models of transformers compute them."""
    if shape.divisor != 1:
        x = x / shape.divisor
    return x if shape.cap is None else torch.tanh(x / shape.cap) * shape.cap


class HeadTask(Protocol):
    """What is computed by the head: a loss, scores, logits.

    Its fields are plain data.
    """

    def run(self, head: Head, hidden: Tensor, targets: Targets):
        """Return the task's result.

        Args:
            head: (..., D) -> logits (..., V), with `out_features` = V; to be called by `head.forward`, see
                `LMHeadLoss`.
            hidden: (B, T, D) final hidden states.
            targets: of the batch; other positions count nowhere.
        """
        ...


@dataclass(frozen=True)
class Logits:
    """All logits of a small batch at once, (B, T, V)."""

    def run(self, head: Head, hidden: Tensor, targets: Targets) -> Tensor:
        """Return the logits."""
        return head.forward(hidden)


class LMHeadLoss(nn.Module):
    """The end of the model's forward: a loss, or another `HeadTask`.

    It owns no weights; its child is the model's head, whose parameters keep their names. To ZeRO 3 it is a leaf: the
    head's weights stay gathered for the whole task, however many chunks that has on this rank. So tasks call
    `head.forward`: hooks of the head itself would gather and release for every chunk.

    Args:
        head: of the model.
        shape: what the model makes of its output.
    """

    _z3_leaf = True  # read by DeepSpeed

    def __init__(self, head: nn.Module, shape: LogitShape = PLAIN):
        super().__init__()
        self.head, self.shape = head, shape

    def forward(self, hidden: Tensor, targets: Targets, task: HeadTask):
        """Return the result of the task; arguments as of `HeadTask.run`."""
        return task.run(shaped(self.head, self.shape), hidden, targets)


def logits_function(head: Head) -> Callable[[Tensor], Tensor]:
    """Return the function (tokens, D) -> logits (tokens, V) for many chunks.

    It gives no gradients of the head's weights, which must be gathered as long as it is used.
    """
    if isinstance(head, ShapedHead):
        inner, shape = logits_function(head.head), head.shape
        return lambda x: shape_logits(inner(x), shape)
    return LinearHead(head).forward if type(head) is nn.Linear else head.forward


def open_head(head: Head) -> OpenHead:
    """Return a head ready for a loop over chunks with gradients.

    Args:
        head: (tokens, D) -> (tokens, V), with `out_features` = V.
    """
    if isinstance(head, ShapedHead):
        return OpenShapedHead(open_head(head.head), head.shape)
    return LinearHead(head) if type(head) is nn.Linear else AnyHead(head)


class OpenHead(Protocol):
    """A head in a loop over chunks, see `LinearHead`."""

    out_features: int
    parameters: list[nn.Parameter]
    gradients: list[Tensor]

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (tokens, V) of x (tokens, D), which `backward` refers to; they may be overwritten."""
        ...

    def backward(self, grad: Tensor, inputs: bool) -> Tensor | None:
        """Add to `gradients`, and return the gradient of `x` where it is needed."""
        ...


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


class OpenShapedHead:
    """The open head of a `ShapedHead`; used as `LinearHead`.

    Args:
        head: what gives the output.
        shape: what makes logits of it.
    """

    def __init__(self, head: OpenHead, shape: LogitShape):
        self._head, self._shape = head, shape
        self.out_features, self.parameters = head.out_features, head.parameters

    @property
    def gradients(self) -> list[Tensor]:
        """Of `parameters`, what `backward` has added up."""
        return self._head.gradients

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, see `LinearHead.forward`."""
        output = self._head.forward(x)
        self._output = None if self._shape.cap is None else output
        return shape_logits(output, self._shape)

    def backward(self, grad: Tensor, inputs: bool) -> Tensor | None:
        """Add to `gradients`, see `LinearHead.backward`; overwrites `grad`."""
        divisor, cap = self._shape
        if self._output is not None and cap is not None:  # the slope of tanh; logits have become their gradient
            grad.mul_(1 - torch.tanh(self._output / (divisor * cap)).square())
        return self._head.backward(grad if divisor == 1 else grad.div_(divisor), inputs)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compare logits and add gradients up in: fp32, of fp64 fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
