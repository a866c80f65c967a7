"""Norms, gated MLPs and rotations of a model with one kernel for each, on a GPU.

The code of transformers takes about eight small kernels for an RMS norm, two for an activation and its product, and
ten for the rotation of queries and keys, and keeps what some of them give for the backward pass. Those of Liger
Kernel (arXiv 2410.10989), and ours for the rotation, round where those do: the numbers are those of the model.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from importlib.util import find_spec
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import why_unavailable

LIBRARY = "liger_kernel"
GATED = "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"  # what is replaced
ROTATION = "apply_rotary_pos_emb"  # what the attention of transformers calls, by its module's own function
COLUMNS = 16  # of the heads that a rotation is tried on


class FusedRotation:
    """Mixin of classes of attention whose rotation is one kernel."""


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


class Fused(NamedTuple):
    """What of a model runs as one kernel.

    Attributes:
        layers: norms and gated MLPs, by Liger.
        rotations: of queries and keys.
    """

    layers: bool = False
    rotations: bool = False


PLAIN, SHIFTED = NormForm(0, 0.0), NormForm(1, 1.0)
NOTHING, ALL = Fused(), Fused(layers=True, rotations=True)


def available() -> Fused:
    """Return what there are kernels for on this machine."""
    return Fused(layers=find_spec(LIBRARY) is not None, rotations=why_unavailable("triton") is None)


def fuse_layers(model: nn.Module, fused: Fused = ALL) -> dict[str, int]:
    """Let norms, gated MLPs and rotations of a model run as one kernel where their tensors are on a GPU, in place.

    Elsewhere, where a norm's weight has another type than its input, and where cos and sin have another than queries
    and keys, they run as before. Modules of attention become of a class of their own name.

    Args:
        model: any; modules whose computation is not one of those known stay as they are.
        fused: which of them.

    Returns:
        How many modules of each class are replaced.
    """
    found: dict[str, int] = {}
    for module in model.modules():
        kind: Any = type(module)
        if fused.layers and (norm_form(kind) or is_gated(module)):
            module.forward = MethodType(_fused_norm if norm_form(kind) else _fused_mlp, module)
        elif fused.rotations and (rotating := with_fused_rotation(kind)) is not None:
            module.__class__ = rotating
        else:
            continue
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


@functools.cache
def with_fused_rotation(kind: type) -> type | None:
    """Return a subclass of a class of attention, whose rotation is one kernel; None: it has none that is known.

    Only the forward that calls the rotation is another: the same code, in a copy of its module's names. Where a class
    inherits that forward, as attention that a hybrid keeps does, its own methods stay before it.
    """
    owner = _rotating(kind)
    if owner is None or issubclass(kind, FusedRotation):
        return None
    forward = vars(owner)["forward"]
    original = forward.__globals__[ROTATION]
    if not is_half_split(original, COLUMNS):
        return None
    names = {**forward.__globals__, ROTATION: _fused_rotation(original)}
    own = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    own.__kwdefaults__ = forward.__kwdefaults__
    functools.update_wrapper(own, forward)
    fused = type(owner.__name__, (FusedRotation, owner), {"forward": own, "__module__": owner.__module__})
    return fused if owner is kind else type(kind.__name__, (kind, fused), {"__module__": kind.__module__})


def is_half_split(function: Callable, columns: int) -> bool:
    """Return whether a function turns this many of 16 columns in two halves and copies the rest, to the last bit."""
    random = torch.Generator().manual_seed(0)
    shapes = (2, 4, 5, COLUMNS), (2, 2, 5, COLUMNS), (2, 5, columns), (2, 5, columns)
    q, k, cos, sin = (torch.randn(shape, generator=random).bfloat16() for shape in shapes)
    try:
        pairs = zip(function(q, k, cos, sin), (q, k), strict=True)
        return all(found.dtype == x.dtype and torch.equal(found, _rotated(x, cos, sin)) for found, x in pairs)
    except (AttributeError, TypeError, ValueError, RuntimeError):  # called in another way, or turns all columns
        return False


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
    first, second = turned.chunk(2, -1)
    other = torch.cat((-second, first), -1)
    return torch.cat((turned * cos[:, None] + other * sin[:, None], rest), -1)


def _rotating(kind: type) -> type | None:
    """Return the class whose forward calls the rotation, where the forwards before it lead there."""
    for cls in kind.__mro__:
        forward = vars(cls).get("forward")
        if forward is None:
            continue
        names = forward.__code__.co_names if isinstance(forward, FunctionType) else ()
        if ROTATION in names:
            return cls
        if "super" not in names:  # such as a decorator around a forward, which is not looked into
            return None
    return None


def _fused_rotation(original: Callable) -> Callable:
    """Return a function that rotates by the kernel what it takes, and by the model's own where it does not."""
    takes_parts = is_half_split(original, COLUMNS // 2)

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if _on_gpu(q) and not args and not kwargs and (takes_parts or cos.shape[-1] == q.shape[-1]):
            ours = _rotation()
            if ours.why_not(q, k, cos, sin) is None:
                return ours.rotate(q, k, cos, sin)
        return original(q, k, cos, sin, *args, **kwargs)

    return rotate


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


def _rotation() -> ModuleType:
    from ..kernels.gpu import rotation  # needs triton

    return rotation


@functools.cache
def _kernels() -> Kernels:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def norm(x: Tensor, weight: Tensor, eps: float, form: NormForm) -> Tensor:
        # not in place: the gradient of a norm's result may also be that of something else
        return LigerRMSNormFunction.apply(x, weight, eps, form.offset, form.casting, False)

    return Kernels(norm, LigerSiLUMulFunction.apply)
