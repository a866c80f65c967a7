"""Are norms, MLPs and rotations of one kernel each the model's own? And how much faster?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3MLP,
    Qwen3RMSNorm,
    apply_rotary_pos_emb,
)

from ...families.fused_layers import ROTATION, available, fuse_layers, with_fused_rotation
from .correct import distance
from .timing import milliseconds

WIDTH, INNER = 1024, 3072
HEADS, SHARED, SIZE = 16, 8, 128
DTYPES = (torch.float32, torch.bfloat16)


def compare_layers(tokens: int, device: str) -> dict:
    """Return distances of output and gradients from the modules' own, in both types, and milliseconds of both.

    Args:
        tokens: of the input.
        device: "cuda", or "cpu", where the fused modules compute as the others.

    Raises:
        RuntimeError: the library is not there.
    """
    if device == "cuda" and not available().layers:
        raise RuntimeError("liger-kernel is not installed")
    config = PreTrainedConfig(hidden_size=WIDTH, intermediate_size=INNER, hidden_act="silu")
    numbers: dict[str, float] = {}
    for name, make in {
        "norm": lambda: Qwen3RMSNorm(WIDTH),
        "norm with offset": lambda: Gemma3RMSNorm(WIDTH),
        "MLP": lambda: Qwen3MLP(config),
    }.items():
        for dtype in DTYPES:
            module = make().to(device, dtype)
            random = torch.Generator(device).manual_seed(0)
            for parameter in module.parameters():
                parameter.data = _normal(*parameter.shape, like=parameter, random=random) / 32
            x, dy = (_normal(4, tokens // 4, WIDTH, like=parameter, random=random) for _ in range(2))
            fused = copy.deepcopy(module)
            fuse_layers(fused)
            own, ours = (partial(_of_module, each, x.requires_grad_(), dy) for each in (module, fused))
            numbers |= {f"{name} {dtype}: {k}": v for k, v in _compare(own, ours, device).items()}
    return numbers


def compare_rotation(tokens: int, device: str) -> dict:
    """Return what `compare_layers` does for the rotation of queries and keys, laid out as projections leave them."""
    fused = with_fused_rotation(Qwen3Attention)
    assert fused is not None  # tests/families/test_fused_layers.py
    function = fused.forward.__globals__[ROTATION]
    numbers: dict[str, float] = {}
    for dtype in DTYPES:
        random, like = torch.Generator(device).manual_seed(0), torch.empty(0, dtype=dtype, device=device)
        q, k, dq, dk = (
            _normal(4, tokens // 4, heads, SIZE, like=like, random=random).transpose(1, 2)
            for heads in (HEADS, SHARED, HEADS, SHARED)
        )
        cos, sin = (_normal(1, tokens // 4, SIZE, like=like, random=random) for _ in range(2))
        given = q.requires_grad_(), k.requires_grad_(), cos, sin
        own, ours = (partial(_of_rotation, each, given, [dq, dk]) for each in (apply_rotary_pos_emb, function))
        numbers |= {f"{dtype}: {name}": value for name, value in _compare(own, ours, device).items()}
    return numbers


def _normal(*shape: int, like: Tensor, random: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=random, device=like.device).to(like.dtype)


def _compare(own: Callable[[], list[Tensor]], fused: Callable[[], list[Tensor]], device: str) -> dict[str, float]:
    worst = max(distance(a, b.double()) for a, b in zip(fused(), own(), strict=True))
    return {"worst": worst, "ms before": milliseconds(own, device), "ms after": milliseconds(fused, device)}


def _of_module(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], dy)]


def _of_rotation(function: Callable, given: tuple[Tensor, ...], grads: list[Tensor]) -> list[Tensor]:
    turned = function(*given)
    return [*(x.detach() for x in turned), *torch.autograd.grad(turned, given[:2], grads)]
