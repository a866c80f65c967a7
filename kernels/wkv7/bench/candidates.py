"""What `bench` compares: our backends, the loop that everybody writes first, flash-linear-attention, and attention.

A candidate is one or more ops with the same signature, one for each setting worth trying. Measures nothing. Foreign
packages are imported when a candidate is used, so that none of them is required.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkvinside.modeling.wkv7 import wkv7

# (r, log_decay, k, v, a, b, initial state or None) -> (y, final state); conventions as in rwkvinside.modeling.wkv7
Op = Callable[..., tuple[Tensor, Tensor | None]]

PRECISIONS = ("fp32", "high", "balanced", "fast")
STEPWISE_TOKENS = 2048  # longest sequence of a candidate whose Python runs token by token
DECAY_BOUND = -math.exp(-0.5)  # of an RWKV-7 gate


@dataclass(frozen=True)
class Candidate:
    """An implementation of WKV-7, or of something to compare it with.

    Attributes:
        name: "family" or "family:member".
        load: returns the op of each setting by name; raises ImportError if a package is missing.
        devices: device types it runs on.
        tokens: longest sequence to measure it on.
        decodes: whether to measure it on a single token with a state.
        key_first: its states are (key, value), the transpose of ours; the caller converts, so that the copy is not
            measured.
        is_wkv7: whether it computes WKV-7, so that its error is meaningful.
    """

    name: str
    load: Callable[[], dict[str, Op]]
    devices: tuple[str, ...] = ("cpu", "cuda")
    tokens: int | None = None
    decodes: bool = True
    key_first: bool = False
    is_wkv7: bool = True

    def ops(self, device: str, tokens: int) -> dict[str, Op]:
        """Return the ops by setting.

        Raises:
            RuntimeError: why there is none for this device and length.
        """
        if device not in self.devices:
            raise RuntimeError(f"runs on {' and '.join(self.devices)} only")
        if self.tokens is not None and tokens > self.tokens:
            raise RuntimeError(f"a loop over tokens, measured up to T = {self.tokens}")
        try:
            return self.load()
        except ImportError as error:
            raise RuntimeError(str(error)) from error


def _backend(**options: str) -> dict[str, Op]:
    return {"": functools.partial(wkv7, **options)}


def _loop(r, w, k, v, a, b, state) -> tuple[Tensor, Tensor]:
    # Indexing each step is the natural way to write it, and makes the backward quadratic in T: each index adds into a
    # gradient of full size. `wkv7_reference` unbinds instead.
    r, k, v, a, b = (x.float() for x in (r, k, v, a, b))
    decay = w.float().exp()
    S = r.new_zeros(*r.shape[::2], r.shape[3], r.shape[3]) if state is None else state
    ys = []
    for t in range(r.shape[1]):
        removed = (S * a[:, t, :, None, :]).sum(-1, keepdim=True)
        S = S * decay[:, t, :, None, :] + removed * b[:, t, :, None, :] + v[:, t, :, :, None] * k[:, t, :, None, :]
        ys.append((S @ r[:, t, :, :, None]).squeeze(-1))
    return torch.stack(ys, 1), S


def _fla_naive() -> dict[str, Op]:
    recurrence = importlib.import_module("fla.ops.generalized_delta_rule.dplr.naive").dplr_recurrence

    def op(r, w, k, v, a, b, state):
        scaled = r * math.sqrt(r.shape[3])  # it divides by that
        y, final = recurrence(*(x.transpose(1, 2) for x in (scaled, k, v, a, b, w)), initial_state=state)
        return y.transpose(1, 2), final

    return {"": op}


def _fla(name: str, *settings: dict) -> dict[str, Op]:
    """Return an op of fla.ops.rwkv7 with each setting, as far as it has the options."""
    run = getattr(importlib.import_module("fla.ops.rwkv7"), name)
    known = inspect.signature(run).parameters
    ops = {}
    for options in settings or ({},):
        options = {key: value for key, value in options.items() if key in known}
        label = " ".join(f"{key}={options[key]}" for key in ("chunk_size", "disable_recompute") if key in options)
        ops[label] = functools.partial(_call_fla, run, options)
    return ops


def _call_fla(run, options, r, w, k, v, a, b, state) -> tuple[Tensor, Tensor]:
    return run(r, w, k, v, a, b, scale=1.0, initial_state=state, output_final_state=True, **options)


FLA_CHUNK = [
    {"safe_gate": True, "lower_bound": DECAY_BOUND, "chunk_size": size, "disable_recompute": saves}
    for size in (16, 64)
    for saves in (False, True)
]


def _attention(r, w, k, v, a, b, state) -> tuple[Tensor, None]:
    q, k, v = (x.transpose(1, 2) for x in (r, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2), None


CANDIDATES = (
    *(
        Candidate(f"triton:{precision}", functools.partial(_backend, backend="triton", precision=precision), ("cuda",))
        for precision in PRECISIONS
    ),
    Candidate("native", functools.partial(_backend, backend="native"), ("cpu",)),
    Candidate("chunked", functools.partial(_backend, backend="chunked"), decodes=False),
    Candidate("reference", functools.partial(_backend, backend="reference"), tokens=STEPWISE_TOKENS),
    Candidate("loop", lambda: {"": _loop}, tokens=STEPWISE_TOKENS),
    Candidate("fla:chunk", lambda: _fla("chunk_rwkv7", *FLA_CHUNK), ("cuda",), decodes=False, key_first=True),
    Candidate("fla:recurrent", lambda: _fla("fused_recurrent_rwkv7"), ("cuda",), key_first=True),
    Candidate("fla:naive", _fla_naive, tokens=STEPWISE_TOKENS, decodes=False, key_first=True),
    Candidate("attention", lambda: {"": _attention}, decodes=False, is_wkv7=False),
)


def choose(names: list[str] | None, *, decode: bool = False) -> list[Candidate]:
    """Return the candidates of a run, in the order of the tables.

    Args:
        names: names or families ("triton" is all its precisions); None is all.
        decode: a single token with a state instead of sequences. "fla:recurrent" is for that only: it has no backward.

    Raises:
        KeyError: an unknown name.
    """
    for name in names or ():
        if not any(name in (c.name, c.name.split(":")[0]) for c in CANDIDATES):
            raise KeyError(name)
    offered = [c for c in CANDIDATES if (c.decodes if decode else c.name != "fla:recurrent")]
    return [c for c in offered if names is None or {c.name, c.name.split(":")[0]} & set(names)]
