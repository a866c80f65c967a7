"""Windows over sequences: are their kernels right on this GPU, and how long do they take next to PyTorch's path?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...kernels.gpu.launch import Launch
from ...kernels.gpu.window import plan_attend, plan_attend_backward
from ...modeling.window_attention import Attended, Beyond, Form, dense_window_attention, window_attention
from .correct import distance, judged
from .mixer_times import moved
from .timing import launch_milliseconds, milliseconds

if TYPE_CHECKING:
    from .compiling import Compiler
    from .stage import Stage

LIMIT = 8e-3  # of outputs and gradients from float64: bf16 rounds weights, and outputs
NAMES = ("values", "beyond", "dq", "dk", "dv", "dscore")


@dataclass(frozen=True)
class WindowCase:
    """Rows of windows with a score of what lies beyond them, in bf16.

    Attributes:
        batch, time: rows and tokens.
        heads: of queries.
        groups: heads of keys and values.
        size: columns of a head.
        window, sinks: last and first tokens.
        documents: of a row, of one length; 1: the row is a document.
    """

    batch: int
    time: int
    heads: int
    groups: int
    size: int
    window: int = 64
    sinks: int = 4
    documents: int = 1

    @property
    def name(self) -> str:
        """Sizes in words."""
        packed = f", {self.documents} documents a row" if self.documents > 1 else ""
        heads = f"{self.heads} heads of {self.size} in {self.groups} groups"
        return f"windows {self.batch} x {self.time}, {heads}, {self.window} + {self.sinks}{packed}"

    def inputs(self, device: str) -> tuple[list[Tensor], Beyond]:
        """Return queries, keys, values, and what scores the tokens beyond windows; random numbers if there is memory.

        All want a gradient.
        """
        random = None if device == "meta" else torch.Generator(device).manual_seed(0)

        def normal(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device).normal_(generator=random).requires_grad_()

        heads = (self.heads, self.groups, self.groups)
        tokens = [normal(self.batch, self.time, count, self.size, dtype=torch.bfloat16) for count in heads]
        far = (normal(*shape, dtype=torch.float32) for shape in ((self.heads, self.size), (self.heads,), (self.heads,)))
        return tokens, Beyond(*far)

    def options(self, device: str) -> dict[str, Any]:
        """Return the bounds of documents, if rows have several."""
        if self.documents == 1:
            return {}
        step = self.time // self.documents
        places = [row * self.time + part * step for row in range(self.batch) for part in range(self.documents)]
        bounds = torch.tensor([*places, self.batch * self.time], dtype=torch.int32, device=device)
        return {"cu_seqlens": bounds}

    def launches(self, device: str) -> list[Launch]:
        """Return the launches of forward and backward; on the meta device without memory."""
        tokens, beyond = self.inputs(device)
        q, k, v = (x.detach().flatten(0, 1) for x in tokens)
        far = tuple(x.detach() for x in beyond)
        step = self.time // self.documents
        start = torch.arange(len(q), device=device).div(step, rounding_mode="floor") * step
        given = q, k, v, start, None, far, self.window, self.sinks, 0.0
        forward, (values, weight, lse) = plan_attend(*given)
        return [*forward, *plan_attend_backward(*given, values, lse, q, weight)[0]]


def run(stage: Stage, compiler: Compiler, bandwidth: float) -> None:
    """Check windows, then time them.

    Args:
        stage: whose time is used.
        compiler: of the stage.
        bandwidth: bytes per second of a copy.
    """
    device = stage.device
    for what, cases in ((", checked", checked(stage.dry)), ("", timed(stage.dry))):
        compiler.ahead(f"windows{what}", [launch for case in cases for launch in case.launches("meta")])
        for case in cases:
            work = partial(against_dense, case, device) if what else partial(times, case, device, bandwidth)
            stage.attempt(f"{case.name}{what}", work, 2 + compiler.seconds(case.launches("meta")))


def checked(dry: bool) -> list[WindowCase]:
    """Return the cases that are compared with all scores in float64."""
    if dry:
        return [WindowCase(1, 80, 2, 1, 16, window=9, sinks=2, documents=2)]
    sizes = [WindowCase(2, 700, 4, 2, size, documents=2) for size in (64, 128, 256)]
    return [*sizes, WindowCase(1, 1400, 2, 1, 64, window=200, sinks=20)]


def timed(dry: bool) -> list[WindowCase]:
    """Return the cases that are timed: rows of align and of distill in Qwen3-0.6B."""
    if dry:
        return [WindowCase(1, 80, 2, 1, 16, window=9, sinks=2)]
    return [WindowCase(4, 4096, 16, 8, 128), WindowCase(32, 512, 16, 8, 128), WindowCase(4, 4096, 16, 8, 128, 1024)]


def against_dense(case: WindowCase, device: str) -> dict:
    """Compare values, weights and all gradients of a case with the dense form in float64."""
    tokens, beyond = case.inputs(device)
    exact = [x.detach().double().requires_grad_() for x in (*tokens, *beyond)]
    form, options = Form(case.window, case.sinks), case.options(device)
    found, _ = window_attention(*tokens, form._replace(beyond=beyond), keep_state=False, backend="triton", **options)
    wanted = dense_window_attention(*exact[:3], form._replace(beyond=Beyond(*exact[3:])), **options)
    assert found.beyond is not None
    assert wanted.beyond is not None
    given = torch.randn_like(found.values), torch.randn_like(found.beyond)
    grads = torch.autograd.grad((found.values, found.beyond), (*tokens, *beyond), given)
    exact_grads = torch.autograd.grad(
        (wanted.values, wanted.beyond), exact, (given[0].double(), given[1].to(wanted.beyond))
    )
    distances = {
        name: distance(x, y)
        for name, x, y in zip(NAMES, _parts(found, grads), _parts(wanted, exact_grads), strict=True)
    }
    return judged(distances, LIMIT)


def _parts(out: Attended, grads: Sequence[Tensor]) -> list[Tensor]:
    """Return what is compared; the score's parameters as one: the sums that are a bias's gradient may cancel."""
    return [*out, *grads[:3], torch.cat([grad.flatten() for grad in grads[3:]])]


def times(case: WindowCase, device: str, bandwidth: float) -> dict:
    """Time every launch of a case, and both passes as a user calls them, by these kernels and by PyTorch's path.

    Args:
        case: to compute.
        device: "cuda" or "cpu".
        bandwidth: bytes per second of a copy, for the time that the bytes of a launch take.
    """
    launches = case.launches(device)
    for launch in launches:  # so that none reads what no one has written
        launch.run()
    rows = {}
    for launch in launches:
        ms = launch_milliseconds(launch.run, device, 10)
        rows[launch.kernel.__name__] = {"ms": ms, "floor_ms": 1e3 * moved(launch) / bandwidth}
    tokens, beyond = case.inputs(device)
    form, options = Form(case.window, case.sinks, beyond=beyond), case.options(device)

    def both_passes(backend: str) -> None:
        out, _ = window_attention(*tokens, form, keep_state=False, backend=backend, **options)
        torch.autograd.grad((out.values, out.beyond), (*tokens, *beyond), (out.values, out.beyond))

    paths = {"triton": "triton", "pytorch": "chunked"}
    return {"window_launches": rows} | {
        f"{name}_ms": milliseconds(lambda backend=backend: both_passes(backend), device, 10)
        for name, backend in paths.items()
    }
