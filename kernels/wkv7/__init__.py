"""Compiled WKV-7 kernels: C++ for CPUs (`native`), Triton for GPUs (`gpu`), chosen by `rwkvinside.modeling.wkv7`.

Importing this imports neither of them, nor torch, so that the benchmark's help appears at once. Exported models use it
too if it is installed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import ModuleType

    import torch
    from torch import Tensor

# What `rwkvinside.modeling.wkv7` and the copies of it in exported models call. An export runs on its own files where it
# finds another number here: raise it when a function that they call is renamed, removed, or takes or returns something
# else. New functions leave it as it is.
INTERFACE = 3


@functools.cache
def why_unavailable(backend: str) -> str | None:
    """Return why a backend cannot run here and what to install, None if it can.

    The first call for "native" may compile it, once, into the user's cache.
    """
    if backend == "native":
        from .native import why_unavailable

        return why_unavailable()
    from rwkvinside.modeling.wkv7_triton import why_unavailable

    return why_unavailable()


def instructions() -> str:
    """Return the native kernel's instruction set here: "avx512", "avx2" or "portable"."""
    from .native import load

    return load().wkv7_instructions().decode()


def why_unsupported(backend: str, device: str, dtype: torch.dtype, head_size: int) -> str | None:
    """Return why a backend does not take such tensors on any machine, None if it does.

    Args:
        backend: "native" or "triton".
        device: type of the device, such as "cuda".
        dtype: of the inputs.
        head_size: N.
    """
    if backend == "triton":
        from rwkvinside.modeling.wkv7_triton import why_unsupported

        return why_unsupported(device, dtype, head_size)
    import torch

    if dtype == torch.float64:
        return "it computes in fp32 and was given float64"
    if head_size % 8 or not 8 <= head_size <= 256:
        return f"it takes head sizes that are multiples of 8 from 8 to 256, not {head_size}"
    return None if device == "cpu" else f"it runs on cpu tensors and was given {device}"


def kept_beside_inputs(head_size: int, bf16: bool) -> float:
    """Return the bytes a token and head that the Triton kernels keep for their backward beside their inputs.

    They are the state before each chunk and the rows that b writes. Nothing of torch or triton is imported.

    Args:
        head_size: N.
        bf16: whether the inputs are in bf16.
    """
    from .gpu.table import HEAD_SIZES, lookup

    padded = min(size for size in HEAD_SIZES if size >= head_size)
    length = lookup(padded, None, "balanced" if bf16 else "fp32").length
    return (2 if bf16 else 4) * (padded * padded / length + padded)


def run(
    backend: str,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    *,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    precision: str,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    """Run a backend that is available and supports the inputs.

    Arguments and results are those of `rwkvinside.modeling.wkv7.wkv7`; w is the log decay.
    """
    if backend == "native":
        from .native import wkv7

        return wkv7(r, w, k, v, a, b, state, mask, cu_seqlens, inplace)
    if r.shape[1] == 1 and cu_seqlens is None and not _tracked(r, w, k, v, a, b, state):
        import torch

        from .gpu.decode import step

        if state is None:
            state = r.new_zeros(r.shape[0], r.shape[2], r.shape[3], r.shape[3], dtype=torch.float32)
        elif not inplace:
            state = state.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        y = step(*(x[:, 0] for x in (r, w, k, v, a, b)), state, None if mask is None else mask[:, 0])
        return y[:, None], state
    from .gpu import wkv7

    return wkv7(r, w, k, v, a, b, state, mask, cu_seqlens, precision)


def mixer_ops() -> ModuleType:
    """Return the Triton ops around the recurrence, `inputs` and `output`; they run where the backend "triton" does."""
    from .gpu import mixer

    return mixer


def mixer_step(**inputs: Tensor | float | bool | None) -> Tensor:
    """Take one token of a whole time mixer by its Triton kernel, without gradient.

    Arguments, result and errors are those of `gpu.mixer_step.mixer_step`, the operator, which a compiler sees.
    """
    import torch

    from .gpu.mixer_step import launch_mixer_step, mixer_step

    return (mixer_step if torch.compiler.is_compiling() else launch_mixer_step)(**inputs)


def shift_step(x: Tensor, last: Tensor, mixes: list[Tensor], mask: Tensor | None) -> Tensor:
    """Mix one token with the one before it for every map of a mixer by its Triton kernel, without gradient.

    Arguments, result and errors are those of `gpu.shift_step.shift_step`, the operator, which a compiler sees. Where
    this function exists, `mixer_step` takes the other parts of stock RWKV-7 and `low_rank` an input for each map.
    """
    import torch

    from .gpu.shift_step import launch_shift_step, shift_step

    return (shift_step if torch.compiler.is_compiling() else launch_shift_step)(x, last, mixes, mask)


def window_step(*inputs: Tensor | int | None) -> Tensor:
    """Take one token of a window beside a recurrence by its Triton kernel, without gradient.

    Arguments, result and errors are those of `gpu.window_step.window_step`, the operator, which a compiler sees.
    """
    import torch

    from .gpu.window_step import launch_window_step, window_step

    return (window_step if torch.compiler.is_compiling() else launch_window_step)(*inputs)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, window: int, sinks: int, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Attend to windows of whole sequences by Triton kernels; arguments, result and errors as `gpu.window` has them."""
    from .gpu.window import window_attention

    return window_attention(q, k, v, start, window, sinks, **options)


def low_rank(
    x: Tensor | Sequence[Tensor], downs: Sequence[Tensor], ups: Sequence[Tensor], activations: Sequence[str]
) -> list[Tensor] | None:
    """Compute the low-rank maps of a few tokens by two Triton launches, without gradient.

    Arguments, result and errors are those of `gpu.low_rank.low_rank`. None where products of whole batches are to be
    preferred, and while compiling: a compiler sees no launches.
    """
    import torch

    from .gpu.low_rank import MAX_ROWS, low_rank

    rows = len(x if isinstance(x, torch.Tensor) else x[0])
    if rows > MAX_ROWS or torch.compiler.is_compiling():
        return None
    return low_rank(x, downs, ups, activations)


def _tracked(*tensors: Tensor | None) -> bool:
    import torch

    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
