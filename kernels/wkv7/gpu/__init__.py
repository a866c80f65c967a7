"""WKV-7 on a GPU, in Triton: `wkv7` trains and prefills (op.py), `decode.step` takes one token."""

from rwkvinside.kernels.gpu.op import wkv7

__all__ = ["wkv7"]
