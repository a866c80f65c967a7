"""The compiled library through ctypes: finding it, its C structures, and views of tensors for it."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from .build import CompileError, source_hash
from .cache import cached_library

SEGMENT = 16  # tokens between checkpoints, kSegment in wkv7.h
_TYPES = {torch.float32: 0, torch.bfloat16: 1}


class View(ctypes.Structure):
    """Wkv7View of wkv7.h: (tokens, heads, size) with strides; built by `view`."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("token", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("type", ctypes.c_int32),
        ("group", ctypes.c_int32),
    ]


class Problem(ctypes.Structure):
    """Wkv7Problem of wkv7.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("sequences", "heads", "size")),
        *((name, ctypes.c_void_p) for name in ("bounds", "tokens", "segments")),
        ("threads", ctypes.c_int32),
    ]


class Forward(ctypes.Structure):
    """Wkv7Forward of wkv7.h."""

    _fields_ = [
        *((name, View) for name in ("r", "w", "k", "v", "a", "b", "y")),
        *((name, ctypes.c_void_p) for name in ("initial", "final", "checkpoints", "removed")),
    ]


class Backward(ctypes.Structure):
    """Wkv7Backward of wkv7.h."""

    _fields_ = [
        *((name, View) for name in ("r", "w", "k", "v", "a", "b", "dy")),
        *((name, ctypes.c_void_p) for name in ("checkpoints", "removed", "d_final")),
        *((name, View) for name in ("dr", "dw", "dk", "dv", "da", "db")),
        ("d_initial", ctypes.c_void_p),
    ]


def view(x: Tensor, heads: int) -> View:
    """Describe a tensor for the library.

    Args:
        x: (tokens, G, N), fp32 or bf16, last dimension contiguous, G dividing `heads`.
        heads: H, of the receptance.
    """
    return View(x.data_ptr(), x.stride(0), x.stride(1), _TYPES[x.dtype], heads // x.shape[1])


def pointer(x: Tensor | None) -> int | None:
    """Return the address of a contiguous tensor's data; None becomes a null pointer."""
    return None if x is None else x.data_ptr()


@functools.cache
def load() -> ctypes.CDLL:
    """Load the library.

    It is the one built at installation if its sources are these, else the one in the user's cache.

    Raises:
        CompileError: there is none, and it cannot be compiled or loaded.
    """
    current = source_hash()
    for path in sorted(Path(__file__).parent.glob("_wkv7*.so")):
        try:
            library = _open(path)
        except CompileError:  # of another machine, or damaged: the one in the cache is compiled here
            continue
        if library.wkv7_source() == current.encode():
            return library
    return _open(cached_library())


@functools.cache
def why_unavailable() -> str | None:
    """Return why the library cannot be used on this machine, None if it can.

    Compiles it if that has not been done yet.
    """
    try:
        load()
    except CompileError as error:
        return str(error)
    return None


def _open(path: Path) -> ctypes.CDLL:
    try:
        return _declare(ctypes.CDLL(str(path)))
    except (OSError, AttributeError) as error:  # AttributeError: a library without our functions
        raise CompileError(f"{path} cannot be loaded: {error}") from error


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    library.wkv7_source.restype = library.wkv7_instructions.restype = ctypes.c_char_p
    library.wkv7_choose.argtypes = [ctypes.c_char_p]
    library.wkv7_forward.argtypes = [ctypes.POINTER(Problem), ctypes.POINTER(Forward)]
    library.wkv7_backward.argtypes = [ctypes.POINTER(Problem), ctypes.POINTER(Backward)]
    library.wkv7_forward.restype = library.wkv7_backward.restype = None
    return library
