"""WKV-7 on a GPU, in Triton.

`wkv7` trains and prefills (op.py), `decode.step` takes one token, `mixer_step.mixer_step` one of a whole time mixer,
before which `shift_step.shift_step` shifts the tokens of stock RWKV-7.
"""

from rwkvinside.kernels.gpu.op import wkv7

__all__ = ["wkv7"]
