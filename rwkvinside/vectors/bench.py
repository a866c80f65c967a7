"""Sizes and speed of the architectures on random vectors: no training, no quality."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median, quantiles

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import UserError
from ..support.text import did_you_mean
from .diffusion import LatentDiffusion
from .model import build_model
from .settings import ARCHITECTURES, WIDTH, ModelConfig

ROWS = 8  # of the forward and backward pass


@dataclass(frozen=True)
class Speed:
    """What was measured of an architecture.

    Attributes:
        arch, pattern: its name, and kinds of layers.
        params: that train.
        causal: it predicts after every vector, and can go on from a state.
        train_ms: median of a forward and backward pass of `ROWS` windows.
        p50_ms, p95_ms: of one prediction from one context.
        steps: denoising steps of a prediction; 0: it predicts at once.
        state_bytes: of a stream, after one context; None where there is no state.
    """

    arch: str
    pattern: str
    params: int
    causal: bool
    train_ms: float
    p50_ms: float
    p95_ms: float
    steps: int
    state_bytes: int | None

    def to_dict(self) -> dict:
        """Return all numbers by name."""
        return asdict(self)


def choose(names: Sequence[str]) -> list[str]:
    """Return the architectures that were named; "all" is all of them.

    Raises:
        UserError: an unknown one.
    """
    if list(names) == ["all"]:
        return list(ARCHITECTURES)
    for name in names:
        if name not in ARCHITECTURES:
            cause = f"architecture {name!r} is not known{did_you_mean(name, ARCHITECTURES)}"
            raise UserError(cause, f"architectures: {', '.join(ARCHITECTURES)}, or all")
    return list(names)


def measure(
    names: Sequence[str],
    config: ModelConfig,
    context: int,
    device: torch.device,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Speed]:
    """Yield what was measured of each architecture.

    Args:
        names: of `ARCHITECTURES`.
        config: widths and depth; the architecture and its options are replaced.
        context: vectors of a window.
        device: where.
        repeats: predictions that are timed, at least 2.
        clock: seconds; `time.process_time` on a machine that others use too.
    """
    d_in = config.d_in or WIDTH
    for name in names:
        model = build_model(config.model_copy(update={"arch": name, "options": {}})).to(device)
        train_ms = _training(model, d_in, context, device, clock)
        model.eval()
        x = F.normalize(torch.randn(1, context, d_in, device=device), dim=-1)
        times = [_timed(partial(model, x), device, clock) for _ in range(repeats + 2)][2:]
        cuts = quantiles(times, n=20)
        with torch.no_grad():
            state = model(x).state
        layers = [] if state is None else [part for layer in state.layers for part in layer or ()]
        yield Speed(
            name,
            config.model_copy(update={"arch": name}).resolved().pattern or "",
            sum(p.numel() for p in model.parameters() if p.requires_grad),
            bool(model.causal),
            train_ms,
            cuts[9],
            cuts[18],
            model.steps if isinstance(model, LatentDiffusion) else 0,
            sum(part.numel() * part.element_size() for part in layers) if layers else None,
        )


def _training(model: nn.Module, d_in: int, context: int, device: torch.device, clock: Callable[[], float]) -> float:
    """Return the median milliseconds of three forward and backward passes (the first one is not counted)."""
    x = F.normalize(torch.randn(ROWS, context, d_in, device=device), dim=-1)

    def step() -> None:
        loss = model.denoising_loss(x, x[:, -1])[0] if isinstance(model, LatentDiffusion) else model(x).y.sum()
        loss.backward()
        model.zero_grad()

    return median([_timed(step, device, clock, grad=True) for _ in range(4)][1:])


def _timed(work: Callable, device: torch.device, clock: Callable[[], float], grad: bool = False) -> float:
    """Return the milliseconds of some work."""
    with torch.set_grad_enabled(grad):
        _wait(device)
        start = clock()
        work()
        _wait(device)
    return 1000 * (clock() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
