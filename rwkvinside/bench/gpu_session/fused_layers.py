"""Are norms and MLPs on Liger's kernels the model's own? And how much faster?"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from ...families.fused_layers import fuse_layers, installed
from .correct import distance
from .timing import milliseconds

WIDTH, INNER = 1024, 3072


def compare_layers(tokens: int, device: str) -> dict:
    """Return distances of output and gradients from the modules' own, in both types, and milliseconds of both.

    Args:
        tokens: of the input.
        device: "cuda", or "cpu", where the fused modules compute as the others.

    Raises:
        RuntimeError: the library is not there.
    """
    if device == "cuda" and not installed():
        raise RuntimeError("liger-kernel is not installed")
    config = PreTrainedConfig(hidden_size=WIDTH, intermediate_size=INNER, hidden_act="silu")
    numbers: dict[str, float] = {}
    for name, make in {
        "norm": lambda: Qwen3RMSNorm(WIDTH),
        "norm with offset": lambda: Gemma3RMSNorm(WIDTH),
        "MLP": lambda: Qwen3MLP(config),
    }.items():
        for dtype in (torch.float32, torch.bfloat16):
            numbers |= {f"{name} {dtype}: {k}": v for k, v in _compare(make(), tokens, dtype, device).items()}
    return numbers


def _compare(module: nn.Module, tokens: int, dtype: torch.dtype, device: str) -> dict[str, float]:
    module.to(device, dtype)
    random = torch.Generator(device).manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random, device=device).to(dtype) / 32
    x, dy = (torch.randn(4, tokens // 4, WIDTH, generator=random, device=device).to(dtype) for _ in range(2))
    x.requires_grad_()
    wanted = _results(module, x, dy)
    before = milliseconds(lambda: _results(module, x, dy), device)
    fuse_layers(module)
    found = _results(module, x, dy)
    after = milliseconds(lambda: _results(module, x, dy), device)
    worst = max(distance(a, b.double()) for a, b in zip(found, wanted, strict=True))
    return {"worst": worst, "ms before": before, "ms after": after}


def _results(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], dy)]
