"""Norms and gated MLPs of a model with one kernel for each, by Liger Kernel (arXiv 2410.10989), on a GPU.

The code of transformers takes about eight small kernels for an RMS norm and two for an activation and its product, and
keeps what each of them gives for the backward pass. Liger's round where those do: the numbers are those of the model.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from importlib.util import find_spec
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

LIBRARY = "liger_kernel"
GATED = "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"  # what is replaced


class NormForm(NamedTuple):
    """What RMS norms differ in.

    Attributes:
        casting: Liger's number for where types change: 0, before the weight; 1, behind it.
        offset: added to the weight.
    """

    casting: int
    offset: float


class Kernels(NamedTuple):
    """What computes.

    Attributes:
        norm: of an input, its weight, epsilon and form.
        gate: SiLU of a gate, times a value.
    """

    norm: Callable[[Tensor, Tensor, float, NormForm], Tensor]
    gate: Callable[[Tensor, Tensor], Tensor]


PLAIN, SHIFTED = NormForm(0, 0.0), NormForm(1, 1.0)


def installed() -> bool:
    """Return whether the library is there."""
    return find_spec(LIBRARY) is not None


def fuse_layers(model: nn.Module) -> dict[str, int]:
    """Let norms and gated MLPs of a model run on Liger's kernels where their tensors are on a GPU, in place.

    Elsewhere, and where a norm's weight has another type than its input, they run as before.

    Args:
        model: any; modules whose computation is not one of those known stay as they are.

    Returns:
        How many modules of each class are replaced.
    """
    found: dict[str, int] = {}
    for module in model.modules():
        kind = type(module)
        forward = _fused_norm if norm_form(kind) else _fused_mlp if is_gated(module) else None  # type: ignore[arg-type]
        if forward is not None:
            module.forward = MethodType(forward, module)
            found[kind.__name__] = found.get(kind.__name__, 0) + 1
    return found


@functools.cache
def norm_form(kind: Any) -> NormForm | None:
    """Return which norm a class of modules computes, to the last bit of bf16; None: it is no norm, or another one."""
    if not kind.__name__.endswith("RMSNorm"):
        return None
    random = torch.Generator().manual_seed(0)
    try:
        norm = kind(64)
        norm.weight.data = torch.randn(64, generator=random).bfloat16()
        eps = _epsilon(norm)
        x = (3 * torch.randn(32, 64, generator=random)).bfloat16()
        given = norm(x)
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    except (AttributeError, TypeError, RuntimeError):  # made in another way, no weight, no epsilon
        return None
    forms = {PLAIN: norm.weight * normed.bfloat16(), SHIFTED: (normed * (1 + norm.weight.float())).bfloat16()}
    return next((form for form, value in forms.items() if torch.equal(value, given)), None)


def is_gated(module: nn.Module) -> bool:
    """Return whether a module is an MLP with a gate of SiLU and nothing else."""
    if not type(module).__name__.endswith("MLP") or {n for n, _ in module.named_children()} != {
        *("gate_proj", "up_proj", "down_proj", "act_fn")
    }:
        return False
    silu = type(module.act_fn).__name__ in ("SiLU", "SiLUActivation")
    return silu and GATED in inspect.getsource(type(module).forward)


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _epsilon(norm: Any) -> float:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


def _fused_norm(self: Any, x: Tensor) -> Tensor:
    if not _on_gpu(x) or x.dtype != self.weight.dtype:
        return type(self).forward(self, x)
    form = norm_form(type(self))  # type: ignore[arg-type]
    assert form is not None  # `fuse_layers` has looked
    return _kernels().norm(x, self.weight, _epsilon(self), form)


def _fused_mlp(self: Any, x: Tensor) -> Tensor:
    if not _on_gpu(x):
        return type(self).forward(self, x)
    return self.down_proj(_kernels().gate(self.gate_proj(x), self.up_proj(x)))


@functools.cache
def _kernels() -> Kernels:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def norm(x: Tensor, weight: Tensor, eps: float, form: NormForm) -> Tensor:
        # not in place: the gradient of a norm's result may also be that of something else
        return LigerRMSNormFunction.apply(x, weight, eps, form.offset, form.casting, False)

    return Kernels(norm, LigerSiLUMulFunction.apply)
