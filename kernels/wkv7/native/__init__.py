"""WKV-7 on a CPU: the recurrence step by step in C++, with AVX-512, AVX2 or plain vectors chosen at run time."""

from .library import load, why_unavailable
from .op import wkv7

__all__ = ["load", "why_unavailable", "wkv7"]
