"""What llama.cpp computes of a file, in PyTorch: its graph of `arwkv7`, from the file's own numbers and tensors.

In fp64, so that what differs from the trained model is that one's rounding alone: a few huge activations of real models
make thousandths of a logit of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import VerificationError
from ...modeling.wkv7 import wkv7
from ...support.extras import import_extra
from .layout import ARCHITECTURE, MIXED_INPUTS

GROUP_NORM_EPS, LEAST_NORM = 64e-5, 1e-12  # constants of llama.cpp's graph
DECAY = -0.606531


class GGUFModel:
    """A file, of which tensors are read when they are needed.

    Args:
        path: of the file.

    Attributes:
        fields: the values of its header by name.
        tensors: its tensors by name, as the library `gguf` reads them.

    Raises:
        VerificationError: it is not a GGUF file of this architecture.
    """

    def __init__(self, path: Path):
        self._gguf = import_extra("gguf", "a GGUF file")
        try:
            reader = self._gguf.GGUFReader(path)
            self.fields = {name: field.contents() for name, field in reader.fields.items()}
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise VerificationError(f"{path} is not a GGUF file, or it is damaged: {error}") from error
        if (found := self.field("general.architecture")) != ARCHITECTURE:
            raise VerificationError(f"{path} has architecture {found!r}, not {ARCHITECTURE}")
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}

    def field(self, name: str, default: Any = None) -> Any:
        """Return a value of the file's header; `default` where it has none."""
        return self.fields.get(name, default)

    def number(self, name: str) -> Any:
        """Return a number of the architecture."""
        return self.field(f"{ARCHITECTURE}.{name}")

    def tensor(self, name: str) -> Tensor:
        """Return a tensor in fp64, as rows of what it is multiplied with."""
        stored = self.tensors[name]
        values = self._gguf.quants.dequantize(stored.data, stored.tensor_type)
        return torch.from_numpy(np.array(values, np.float64)).view(*map(int, reversed(stored.shape)))

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """Return the logits (B, T, V) in fp64 of token ids (B, T), each row a document."""
        eps = self.number("attention.layer_norm_rms_epsilon")
        x, first = self.tensor("token_embd.weight")[ids], None
        for i in range(self.number("block_count")):
            block = f"blk.{i}"
            y, first = self._mix(block, _norm(x, self.tensor(f"{block}.attn_norm.weight"), eps), first)
            x = x + y
            y = _norm(x, self.tensor(f"{block}.ffn_norm.weight"), eps)
            gate, up = (y @ self.tensor(f"{block}.ffn_{name}.weight").t() for name in ("gate", "up"))
            x = x + (F.silu(gate) * up) @ self.tensor(f"{block}.ffn_down.weight").t()
        return _norm(x, self.tensor("output_norm.weight"), eps) @ self.tensor("output.weight").t()

    def _mix(self, block: str, x: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the output of a layer's time mixing, and the values of the first layer."""
        size = self.number("wkv.head_size")

        def get(name: str, part: str = "weight") -> Tensor:
            return self.tensor(f"{block}.time_mix_{name}.{part}")

        def times(name: str, given: Tensor) -> Tensor:
            return given @ get(name).t()

        def heads(given: Tensor) -> Tensor:
            return given.unflatten(-1, (-1, size))

        before = F.pad(x, (0, 0, 1, 0))[:, :-1]
        shares = get("lerp_fused").view(len(MIXED_INPUTS), -1)
        given = {name: x + (before - x) * share for name, share in zip(MIXED_INPUTS, shares, strict=True)}
        r, k, v = (
            times("receptance", given["r"]),
            times("key", given["k"]),
            times("value", given["v"]),
        )
        log_decay = DECAY * torch.sigmoid(times("w2", torch.tanh(times("w1", given["w"]))) + get("w0"))
        if first is None:
            first = v
        else:
            v = v + (first - v) * torch.sigmoid(times("v2", times("v1", given["v"])) + get("v0"))
        rate = torch.sigmoid(times("a2", times("a1", given["a"])) + get("a0"))
        kk = heads(k * get("k_k"))
        kk = kk / kk.norm(dim=-1, keepdim=True).clamp_min(LEAST_NORM)
        k = k + k * get("k_a") * (rate - 1)
        r, k, v = heads(r), heads(k), heads(v)
        y, _ = wkv7(r, heads(log_decay), k, v, -kk, kk * heads(rate))
        if f"{block}.time_mix_ln.weight" in self.tensors:
            y = F.layer_norm(y, (size,), eps=GROUP_NORM_EPS) * heads(get("ln")) + heads(get("ln", "bias"))
        y = y + (r * k * heads(get("r_k"))).sum(-1, keepdim=True) * v
        return times("output", y.flatten(2) * times("g2", torch.sigmoid(times("g1", given["g"])))), first


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)
