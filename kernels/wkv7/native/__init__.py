"""WKV-7 on a CPU: the recurrence step by step in C++, with AVX-512, AVX2 or plain vectors chosen at run time."""

from .library import load, unavailable
from .op import wkv7

__all__ = ["load", "unavailable", "wkv7"]
