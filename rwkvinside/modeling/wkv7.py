"""The WKV-7 recurrence: its contract, a slow reference, and who computes it.

That is, in this order (`_choose`): the compiled kernels of `rwkvinside.kernels` where that package is installed; in
inference on a GPU the Triton kernel of wkv7_triton.py; the chunked path, which runs on any torch device.

Per batch row and head, with the state S of shape (N_v, N_k) in fp32 (RWKV-7 "Goose", arXiv 2503.14456, eq. 1-3)

    S_t = S_{t-1} diag(exp(log_decay_t)) + (S_{t-1} a_t) b_t^T + v_t k_t^T          y_t = S_t r_t

`wkv7` is the one public door. Conventions that differ elsewhere: the decay is given as log decay (not as its own
logarithm), the state is (value, key) (fla stores its transpose), and y is not scaled. This file travels with exported
models: torch only, no I/O.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .wkv7_chunked import Chunked

INTERFACE = 3  # of `rwkvinside.kernels`, as this file calls it


def _installed_kernels() -> Any:
    """Return the compiled kernels of the installed package, None without them or where they have another interface."""
    try:
        from rwkvinside import kernels
    except ImportError:  # an exported model on a machine without the package
        return None
    interface = getattr(kernels, "INTERFACE", "of an early version")
    if interface == INTERFACE:
        return kernels
    warnings.warn(
        f"the kernels of the installed rwkvinside have interface {interface} and this model calls interface "
        f"{INTERFACE}: it runs on its own files; install the rwkvinside that it was exported with to use the kernels",
        stacklevel=2,
    )
    return None


kernels = _installed_kernels()
BACKENDS = ("auto", "reference", "chunked", "native", "triton")
PRECISIONS = ("auto", "fp32", "high", "balanced", "fast")


def wkv7(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    precision: str = "auto",
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run the WKV-7 recurrence over a batch of sequences.

    Args:
        r: (B, T, H, N), any floating dtype; computed in fp32 (fp64 when `r` is fp64). In the RWKV-7 mixer a = -kk and
            b = kk * iclr with kk the L2-normalized key.
        log_decay: (B, T, H, N), values <= 0 (checked on a CPU, but not under `torch.no_grad`); at least -5 for chunked
            and triton (checked on a CPU only). fp32 is advised (bf16 costs 2-3 % near 0).
        k, v, a, b: (B, T, H, N), or (B, T, G, N) each with its own G dividing H: head h reads head h // (H / G).
        state: initial state (B, H, N, N) as (value, key), or (S, H, N, N) with `cu_seqlens`; None is zero.
        mask: (B, T) bool, True for real tokens. A masked step leaves the state as it is and outputs 0.
        cu_seqlens: (S + 1,) integers, 0 first and T last: sequence s is [cu[s], cu[s+1]); needs B = 1. Every sequence
            starts from its own state; empty sequences are allowed. On a GPU its values are not checked.
        backend: "reference" (a loop over time), "chunked" (matrix products over chunks, hand-written backward that
            recomputes), "native" (C++ on a CPU), "triton" (GPU; the kernels of the installed package, without it the
            one in wkv7_triton.py, for inference only), or "auto": the compiled kernel of the device where it can run,
            else the reference for a single step and chunked for more.
        precision: of triton: "fp32", "high", "balanced" or "fast" (docs/wkv7.md); "auto" is fp32 for fp32 inputs and
            balanced otherwise. All others compute in the dtype of the state whatever it says, the Triton kernel of
            wkv7_triton.py too.
        inplace: the final state may be written over `state`, which saves a copy per token when decoding. The returned
            one counts: a backend that has to keep or convert `state` leaves it alone.

    Returns:
        y (B, T, H, N) in v's dtype, and the final state (B or S, H, N, N) in fp32 (fp64 for fp64 inputs). Both carry
        gradient to all inputs, the initial state included.

    Raises:
        ValueError: shapes that do not fit, an unknown backend; on a CPU a log decay above 0, or one that the chosen
            path cannot represent.
        RuntimeError: a backend that is known but cannot run here or on these tensors.
    """
    _check_choices(backend, precision)
    _check_shapes(r, log_decay, {"k": k, "v": v, "a": a, "b": b}, state, mask, cu_seqlens)
    backend = _choose(backend, (r, log_decay, k, v, a, b, state), cu_seqlens)
    if backend != "triton":  # which reads nothing on the host, in its interpreter as on a GPU
        _check_decay(log_decay, mask)
    if backend in ("reference", "chunked"):
        return _run_torch(backend, (r, log_decay, k, v, a, b), state, mask, cu_seqlens)
    mask = None if mask is None else mask.bool()
    if backend == "carried":
        from .wkv7_triton import recur

        return recur(r, log_decay, k, v, a, b, state, mask=mask, inplace=inplace)
    how = dict(mask=mask, cu_seqlens=cu_seqlens, precision=precision, inplace=inplace)
    return kernels.run(backend, r, log_decay, k, v, a, b, state, **how)


_COMPILED = ("native", "triton")


def why_unavailable(backend: str, device: str, dtype: torch.dtype, head_size: int) -> str | None:
    """Return why a backend of the installed package cannot run here on tensors like these; None: it can.

    Says nothing of the Triton kernel of wkv7_triton.py, which stands in for "triton" in inference without the package.

    Args:
        backend: one of `BACKENDS`.
        device: type of device, as in `torch.device.type`.
        dtype: of `r`.
        head_size: N.
    """
    if backend not in _COMPILED:
        return None
    if kernels is None:
        return f"the package rwkvinside is not installed, or its kernels have another interface than {INTERFACE}"
    return _unavailable(backend) or kernels.why_unsupported(backend, device, dtype, head_size)


def _choose(backend: str, inputs: tuple[Tensor | None, ...], cu_seqlens: Tensor | None) -> str:
    """Return who computes: "reference", "chunked", the package's "native" or "triton", or "carried", wkv7_triton.py."""
    r = inputs[0]
    assert r is not None
    properties = (r.device.type, r.dtype, r.shape[3])
    slow = "reference" if r.shape[1] == 1 else "chunked"
    wanted = {"cpu": "native", "cuda": "triton"}.get(r.device.type, slow) if backend == "auto" else backend
    if wanted not in _COMPILED:
        return wanted
    reason = why_unavailable(wanted, *properties)
    if reason and wanted == "triton" and kernels is None:
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
            reason = f"{reason}, and the kernel that came with the model computes no gradients"
        elif cu_seqlens is not None:
            reason = f"{reason}, and the kernel that came with the model takes no packed documents"
        else:
            reason = _carried_unavailable(*properties)
            wanted = "carried"
    if reason is None:
        return wanted
    if backend != "auto":
        raise RuntimeError(f"WKV-7 backend '{backend}' cannot run: {reason}; use 'auto' or 'chunked'")
    # Silent where nothing is amiss: computing in float64, and an exported model on a CPU without the package
    if r.dtype != torch.float64 and (r.is_cuda or kernels is not None):
        _warn_once(f"WKV-7 runs on the slower chunked path: {reason}")
    return slow


@torch.compiler.assume_constant_result
def _unavailable(backend: str) -> str | None:
    return kernels.why_unavailable(backend)


@torch.compiler.assume_constant_result
def _carried_unavailable(device: str, dtype: torch.dtype, head_size: int) -> str | None:
    from .wkv7_triton import why_unavailable, why_unsupported

    return why_unavailable() or why_unsupported(device, dtype, head_size)


_warned: set[str] = set()


@torch.compiler.disable
def _warn_once(message: str) -> None:
    if message not in _warned:  # every layer would say it again at every token
        _warned.add(message)
        warnings.warn(message, stacklevel=3)


def _to_heads(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[2], dim=2)


@torch.compiler.disable  # what it does depends on values, and a loop over chunks gains nothing by being compiled
def _run_torch(
    backend: str, inputs: tuple[Tensor, ...], state: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    r, log_decay, k, v, a, b = inputs
    k, v, a, b = (x if x.shape[2] == r.shape[2] else _to_heads(x, r.shape[2]) for x in (k, v, a, b))
    if mask is not None:
        pad = ~mask.bool()[:, :, None, None]
        log_decay, k, v, a, b = (x.masked_fill(pad, 0) for x in (log_decay, k, v, a, b))
    sequences = r.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
    if state is None:
        state = r.new_zeros(sequences, r.shape[2], r.shape[3], r.shape[3], dtype=dtype)
    if backend == "reference":
        y, state = wkv7_reference(r, log_decay, k, v, a, b, state, cu_seqlens)
    else:
        y, state = Chunked.apply(r, log_decay, k, v, a, b, state.to(dtype), cu_seqlens)
    return (y if mask is None else y.masked_fill(pad, 0)), state


def wkv7_reference(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence as it is written, one step after the other.

    Every faster path is judged by it. Arguments as of `wkv7`.
    """
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        ys, states = [], []
        for s, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            at = (slice(None), slice(start, end))
            y, final = wkv7_reference(r[at], log_decay[at], k[at], v[at], a[at], b[at], state[s : s + 1])
            ys.append(y)
            states.append(final)
        return torch.cat(ys, 1), torch.cat(states)
    dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
    out_dtype = v.dtype
    S = state.to(dtype)
    ys = []
    # unbind, not indexing: the backward of x[:, t] is a full-size zero tensor for each step
    for rt, wt, kt, vt, at, bt in zip(*(x.to(dtype).unbind(1) for x in (r, log_decay, k, v, a, b)), strict=True):
        removed = S @ at.unsqueeze(-1)
        S = S * wt.exp().unsqueeze(-2) + removed * bt.unsqueeze(-2) + vt.unsqueeze(-1) * kt.unsqueeze(-2)
        ys.append((S @ rt.unsqueeze(-1)).squeeze(-1))
    y = torch.stack(ys, 1) if ys else v.new_zeros(v.shape)
    return y.to(out_dtype), S


def _check_choices(backend: str, precision: str) -> None:
    for name, value, allowed in (("backend", backend, BACKENDS), ("precision", precision, PRECISIONS)):
        if value not in allowed:
            raise ValueError(f"unknown WKV-7 {name} {value!r}: choose one of {', '.join(allowed)}")


def _check_shapes(
    r: Tensor,
    log_decay: Tensor,
    others: dict[str, Tensor],
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    if r.dim() != 4 or not r.is_floating_point():
        raise ValueError(f"r is {r.dtype} of shape {tuple(r.shape)}: it must be floating point, (B, T, H, N)")
    if log_decay.shape != r.shape:
        raise ValueError(f"log_decay has shape {tuple(log_decay.shape)}, r has {tuple(r.shape)}: they must agree")
    B, T, H, N = r.shape
    for name, x in others.items():
        if x.dim() != 4 or x.shape[:2] != (B, T) or x.shape[3] != N or not x.shape[2] or H % x.shape[2]:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, r has {tuple(r.shape)}: all must be (B, T, H, N), or have a "
                f"number of heads that divides {H}"
            )
    sequences = B
    if cu_seqlens is not None:
        if B != 1:
            raise ValueError(f"cu_seqlens needs a batch of 1 (concatenate the rows), got {B}")
        # values on a GPU are not looked at: every layer would wait for it
        known = cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()
        if cu_seqlens.dim() != 1 or known and not _rises(cu_seqlens, T):
            raise ValueError(f"cu_seqlens must rise from 0 to T = {T}, got {cu_seqlens.tolist()[:8]}...")
        sequences = cu_seqlens.numel() - 1
    if state is not None and state.shape != (sequences, H, N, N):
        raise ValueError(f"state has shape {tuple(state.shape)}, expected {(sequences, H, N, N)}")
    if mask is not None and mask.shape != (B, T):
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected {(B, T)}")


def _check_decay(log_decay: Tensor, mask: Tensor | None) -> None:
    """Refuse a state that would grow at every step; what is masked may be anything.

    Not in inference: to look costs an eighth of the native kernel's time for a single token (docs/wkv7.md).
    """
    if log_decay.device.type != "cpu" or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    largest = log_decay.detach().amax((2, 3))
    largest = largest if mask is None else largest[mask.bool()]
    if (largest > 0).any():
        raise ValueError(f"log_decay reaches {float(largest.max()):.3g}: it must be 0 or below, or the state explodes")


def _rises(cu_seqlens: Tensor, T: int) -> bool:
    return bool(cu_seqlens[0] == 0 and cu_seqlens[-1] == T and (cu_seqlens.diff() >= 0).all())
