"""How fast is the work around the recurrence? Its four kernels by default, and other settings of the larger two."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.gpu.launch import Launch
from ...kernels.gpu.mixer import DEFAULTS, Work, plan_inputs, plan_inputs_backward, plan_output, plan_output_backward
from .timing import launch_milliseconds

CANDIDATES = {  # the defaults are measured anyway
    "inputs_forward": [Work(8, 4), Work(4, 2), Work(8, 1, 64), Work(8, 1)],
    "inputs_backward": [Work(32, 4, 168), Work(32, 1), Work(8, 1), Work(16, 2), Work(16, 1, 168)],
}


@dataclass(frozen=True)
class MixerCase:
    """A later layer of cxa079 in bf16, whose first layer gets no gradient.

    Attributes:
        batch, time: rows and tokens.
        heads: of r and what has as many.
        groups: heads of keys and values.
        size: columns of a head.
        candidates: most settings of a kernel that are tried beside the default.
    """

    batch: int
    time: int
    heads: int
    groups: int
    size: int
    candidates: int

    @property
    def name(self) -> str:
        """Sizes in words."""
        return f"mixer {self.batch * self.time} tokens, {self.heads} heads of {self.size} in {self.groups} groups"

    def tensors(self, device: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return what the inputs are made of and what the output is made of; random numbers if there is memory."""

        def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device).normal_()

        def tokens(heads: int) -> Tensor:
            return normal(self.batch, self.time, heads, self.size)

        def parameter(*shape: int) -> Tensor:
            return normal(*shape, dtype=torch.float32)

        full, shared = self.heads * self.size, self.groups * self.size
        given = {name: tokens(self.heads) for name in ("r", "decay", "iclr")}
        given |= {name: tokens(self.groups) for name in ("k", "v", "key_gate", "k_first", "value_gate", "v_first")}
        given |= {name: parameter(1, self.time, self.size) for name in ("cos", "sin")}
        given |= {name: parameter(self.size) for name in ("r_norm", "k_norm")}
        given |= {name: parameter(full) for name in ("w0", "a0", "r_k")}
        given |= {name: parameter(shared) for name in ("k0", "v0")}
        output = {name: tokens(self.heads) for name in ("y", "gate", "dout")} | {"v": tokens(self.groups)}
        output["bonus"] = normal(self.batch, self.time, self.heads, dtype=torch.float32)
        return given, output

    def settings(self) -> Iterator[tuple[str, Work]]:
        """Yield (kernel, work) of all that is timed, the defaults first."""
        yield from DEFAULTS.items()
        yield from ((kernel, work) for kernel, some in CANDIDATES.items() for work in some[: self.candidates])

    def launches(self, device: str) -> dict[tuple[str, Work], Launch]:
        """Return the launches of `settings`; on the meta device without memory."""
        given, output = self.tensors(device)
        _, made = plan_inputs(given, key_scale="decay")
        made = {name: x.normal_() for name, x in made.items()}  # stands for the gradients

        def launch(kernel: str, work: Work) -> Launch:
            last = (*(output[name] for name in ("y", "gate", "bonus", "v")), self.size**-0.5)
            match kernel:
                case "inputs_forward":
                    planned = plan_inputs(given, key_scale="decay", work=work)[0]
                case "inputs_backward":
                    planned = plan_inputs_backward(given, made, key_scale="decay", wanted=set(), work=work)[0]
                case "output_forward":
                    planned = plan_output(*last, work=work)[0]
                case _:
                    planned = plan_output_backward(*last, output["dout"], work=work)[0]
            return planned[0]

        return {(kernel, work): launch(kernel, work) for kernel, work in self.settings()}


def cases(dry: bool) -> list[MixerCase]:
    """Return the cases that are timed: an align step's rows, in Qwen3-0.6B and in Qwen3-8B (four heads a group)."""
    if dry:
        return [MixerCase(1, 20, 4, 2, 16, candidates=1)]
    return [MixerCase(8, 512, 16, 8, 128, candidates=5), MixerCase(8, 512, 32, 8, 128, candidates=3)]


def moved(launch: Launch) -> int:
    """Return the bytes of all tensors of a launch, each read or written once."""
    tensors = {x.data_ptr(): x for x in launch.args.values() if isinstance(x, torch.Tensor)}
    return sum(x.nbytes for x in tensors.values())


def mixer_times(case: MixerCase, device: str, bandwidth: float) -> dict:
    """Time every kernel by default, then the candidates.

    Args:
        case: to compute.
        device: "cuda" or "cpu".
        bandwidth: bytes per second of a copy, for the time that the bytes take.

    Returns:
        `mixer_launches`, by kernel, with defaults; `tried`, the fastest first, by kernel that has candidates; `failed`.
    """
    defaults: dict[str, dict] = {}
    tried: dict[str, list[dict]] = {}
    failed = []
    for (kernel, work), launch in case.launches(device).items():
        try:
            ms = launch_milliseconds(launch.run, device, 10)
        except Exception as error:  # registers that this GPU lacks
            failed.append(f"{kernel} {_words(work)}: {type(error).__name__}: {str(error)[:100]}")
            continue
        if work == DEFAULTS[kernel]:
            size = moved(launch)
            defaults[kernel] = {"ms": ms, "floor_ms": 1e3 * size / bandwidth, "bytes": size}
        if case.candidates and kernel in CANDIDATES:
            tried.setdefault(kernel, []).append({"ms": ms, "with": _words(work)})
    ordered = {kernel: sorted(rows, key=lambda row: row["ms"]) for kernel, rows in tried.items()}
    return {"mixer_launches": defaults, "tried": ordered, "failed": failed}


def _words(work: Work) -> str:
    words = [f"tokens={work.tokens}", f"warps={work.warps}"]
    return " ".join(words + ([f"registers<={work.max_registers}"] if work.max_registers else []))
