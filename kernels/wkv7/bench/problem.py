"""The problems of `bench`: inputs of a shape, calls to measure, the bytes they must move, their errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkvinside.kernels.bench.candidates import Candidate, Op
from rwkvinside.modeling.wkv7 import wkv7_reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
INPUTS = ("r", "w", "k", "v", "a", "b")
PASSES = ("forward", "forward_backward")
ERROR_SHAPE = (2, 256, 4, math.inf)  # errors are measured on at most this much: the reference is a slow loop


class Shape(NamedTuple):
    """One problem: batch, tokens, heads, head size."""

    B: int
    T: int
    H: int
    N: int

    def __str__(self) -> str:
        return " ".join(f"{name}={size}" for name, size in self._asdict().items())


def make_inputs(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> list[Tensor]:
    """Return random r, w, k, v, a, b as the RWKV-7 mixer makes them.

    All are (B, T, H, N); the log decay w is in fp32, the others in `dtype`.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    r, k, v = (normal().to(dtype) for _ in range(3))
    w = normal().sigmoid_().mul_(-math.exp(-0.5))
    removed = F.normalize(normal(), dim=-1)
    b = removed * normal().sigmoid_()
    return [r, w, k, v, (-removed).to(dtype), b.to(dtype)]


def make_state(shape: Shape, device: str, seed: int = 1) -> Tensor:
    """Return a random state (B, H, N, N) in fp32, as after some tokens."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape.B, shape.H, shape.N, shape.N, generator=generator, device=device)


def make_pass(op: Op, name: str, inputs: list[Tensor], state: Tensor | None) -> Callable[[], object]:
    """Return a call without arguments that runs one of `PASSES`.

    The backward computes the gradients of all inputs.
    """
    if name == "forward":

        def forward() -> object:
            with torch.no_grad():
                return op(*inputs, state)

        return forward

    leaves = [x.detach().requires_grad_() for x in inputs]

    def forward_backward() -> object:
        y, _ = op(*leaves, state)
        return torch.autograd.grad(y, leaves, inputs[3].to(y.dtype), allow_unused=True)  # v as the gradient of y

    return forward_backward


def ideal_bytes(shape: Shape, dtype: torch.dtype, name: str) -> int:
    """Return the bytes that any implementation must move in a pass.

    Each input is read and each result written once, in each direction. The state counts for a single token only, where
    it is nearly everything.
    """
    numbers, decays = (6, 1) if name == "forward" else (17, 3)  # with the backward's re-reading, dy and six gradients
    B, T, H, N = shape
    vectors = B * T * H * N * (numbers * dtype.itemsize + decays * 4)
    return vectors + (2 * 4 * B * H * N * N if T == 1 else 0)


def relative_errors(candidate: Candidate, op: Op, shape: Shape, dtype: torch.dtype, device: str) -> dict:
    """Measure relative L2 errors against the reference in fp64.

    Both get the same rounded inputs and a random state.

    Returns:
        {"tokens", "y", "state"} and, for sequences, {"gradient": the worst of seven, "worst": its name}: of r, w, k,
        v, a, b and the initial state, with random gradients of y and of the final state.
    """
    small = Shape(*(int(min(size, most)) for size, most in zip(shape, ERROR_SHAPE, strict=True)))
    inputs = [*make_inputs(small, dtype, device), make_state(small, device)]
    dy, dfinal = make_inputs(small, torch.float32, device, seed=2)[0], make_state(small, device, seed=3)

    def run(op: Op, leaves: list[Tensor], flip: bool) -> list[Tensor]:
        y, final = op(*leaves[:6], leaves[6].mT.contiguous() if flip else leaves[6])
        final = final.mT if flip else final
        if small.T == 1:
            return [y, final]
        loss = (y.double() * dy).sum() + (final.double() * dfinal).sum()
        return [y.detach(), final.detach(), *torch.autograd.grad(loss, leaves)]

    results = run(op, [x.clone().requires_grad_(small.T > 1) for x in inputs], candidate.key_first)
    expected = run(wkv7_reference, [x.double().requires_grad_(small.T > 1) for x in inputs], False)
    y, state, *gradients = (float((x - e).norm() / e.norm()) for x, e in zip(results, expected, strict=True))
    errors = {"tokens": small.T, "y": y, "state": state}
    if gradients:
        worst = max(range(len(gradients)), key=lambda i: (math.isnan(gradients[i]), gradients[i]))
        errors |= {"gradient": gradients[worst], "worst": (*INPUTS, "state")[worst]}
    return errors
