"""Compile every shipped configuration for GPUs that need not be there, and compare with a baseline.

    python -m rwkvinside.kernels.gpu.compile                      a table: registers, spills, shared memory, MMAs
    python -m rwkvinside.kernels.gpu.compile --check baseline.json
    python -m rwkvinside.kernels.gpu.compile --write baseline.json
    python -m rwkvinside.kernels.gpu.compile --only sm_90/64      only names that begin so

The launches are those that the ops plan, on meta tensors; Triton specializes and compiles them as for a real call, with
the ptxas that its wheel ships, bypassing its cache. This finds type errors that the interpreter accepts, spilled
registers, shared memory that does not fit, and loops whose loads wait for each other. It runs nothing, so it says
nothing about results or times. A baseline has an entry for each Triton that it was written with; others allocate
registers differently, so only the limits apply to them.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from rwkvinside.kernels.gpu.decode import plan_step
from rwkvinside.kernels.gpu.launch import Launch
from rwkvinside.kernels.gpu.losses import plan_compare
from rwkvinside.kernels.gpu.low_rank import plan_low_rank
from rwkvinside.kernels.gpu.mixer import Mixed, plan_inputs, plan_inputs_backward, plan_output, plan_output_backward
from rwkvinside.kernels.gpu.mixer_step import LARGEST_NORMED, plan_mixer_step
from rwkvinside.kernels.gpu.op import NARROW, plan_backward, plan_forward
from rwkvinside.kernels.gpu.rotation import plan_rotate
from rwkvinside.kernels.gpu.shift_step import plan_shift_step
from rwkvinside.kernels.gpu.squared_error import plan_error, plan_error_backward
from rwkvinside.kernels.gpu.table import PRECISIONS, Tuning
from rwkvinside.kernels.gpu.window import plan_attend, plan_attend_backward
from rwkvinside.kernels.gpu.window_step import plan_window_step
from rwkvinside.modeling import wkv7_triton
from rwkvinside.support.files import write_text

DESCRIPTION = "Compile every shipped configuration for GPUs that need not be there, and compare with a baseline."
ARCHITECTURES = (80, 90)
HEAD_SIZES = (64, 128, 256)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes per block (CUDA C++ programming guide, compute capabilities)
# Bytes of spill stores and loads together. Few cost nothing: `prepare` for heads of 64 is faster with 824 in one warp
# than with none in two (2.84 and 3.19 ms, docs/measurements)
SPILL_LIMIT = 1280  # of packed rows it has 1232, which have not been timed by themselves
# Accepted differences from the baseline. Another Triton makes larger ones, see `main`.
TOLERANCE = {"registers": 8, "spill": 128, "shared": 1024, "mma": 0, "ahead": 0}


@dataclass(frozen=True)
class Usage:
    """Resources of one compiled kernel.

    Attributes:
        registers: per thread.
        spill: bytes of spill stores and loads per thread.
        shared: bytes of shared memory per block.
        mma: matrix instructions in its code.
        ahead: copies to shared memory that may be under way while it computes; 0: it waits for all of them.
    """

    registers: int
    spill: int
    shared: int
    mma: int
    ahead: int


@dataclass(frozen=True)
class _AbsentGPU:
    """The part of a Triton driver that compiling asks for."""

    architecture: int

    def get_current_device(self) -> int:
        return self.architecture  # Triton caches compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


def _usage(log: str, kernel) -> Usage:
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    if not registers or not spills:
        raise RuntimeError(f"ptxas printed something else than expected about {kernel.name}:\n{log}")
    mma = len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)", kernel.asm["ptx"]))
    ahead = max(map(int, re.findall(r"async_wait.*?num = (\d+)", kernel.asm["ttgir"])), default=0)
    return Usage(int(registers[1]), sum(map(int, spills)), kernel.metadata.shared, mma, ahead)


def shipped(architecture: int) -> Iterator[tuple[str, Launch]]:
    """Yield (name, launch) for every launch that the table's configurations lead to."""
    capability = divmod(architecture, 10)
    for size in HEAD_SIZES:
        prefix = f"sm_{architecture}/{size}"
        for mode in PRECISIONS:
            yield from _named(f"{prefix}/{mode}", plan_training(size, mode, capability))
            yield from _named(f"{prefix}/{mode}", plan_shared(size, mode, capability))
        yield from _named(prefix, plan_decoding(size, capability))
        for tokens in (1, 4096):
            yield from _named(f"{prefix}/carried/{tokens}", plan_carried(size, tokens))
        yield from _named(prefix, plan_mixing(size, capability))
        yield from _named(f"{prefix}/stock", plan_stock_mixing(size, capability))
        yield from _named(prefix, plan_window(size))
        yield from _named(f"{prefix}/window", [*plan_windows(size), *plan_mixed(size)])
        yield from _named(f"{prefix}/mixer", plan_mixer(size))
        yield from _named(prefix, plan_rotation(size))
    # These arguments change the code but hardly its resources: one mode and head size represent all.
    yield from _named(f"sm_{architecture}/64/packed", plan_packed(64, "balanced", capability))
    yield from _named(f"sm_{architecture}/64/first", plan_first_mixing(64, capability))
    yield from _named(f"sm_{architecture}/64/maps", plan_maps())
    for rows in (1, 8):
        yield from _named(f"sm_{architecture}/shift_{rows}", plan_shift(rows))
    for variant in MIXER_VARIANTS:
        yield from _named(f"sm_{architecture}/64/mixer_{variant}", plan_mixer(64, variant))
    for variant in WINDOW_VARIANTS:
        yield from _named(f"sm_{architecture}/64/window_{variant}", plan_windows(64, **WINDOW_VARIANTS[variant]))
    for variant in ROTATION_VARIANTS:
        yield from _named(f"sm_{architecture}/64/rotation_{variant}", plan_rotation(64, **ROTATION_VARIANTS[variant]))
    for variant in LOSS_VARIANTS:
        yield from _named(f"sm_{architecture}/loss_{variant}", plan_loss(variant))
    for width in (1024, 4096):
        yield from _named(f"sm_{architecture}/error_{width}", plan_layer_error(width))
    yield from _named(f"sm_{architecture}/error_fp32", plan_layer_error(1024, torch.float32))


def _named(prefix: str, launches: list[Launch]) -> Iterator[tuple[str, Launch]]:
    for launch in launches:
        name = launch.kernel.__name__.strip("_")
        if "AFFINE" in launch.constants:
            name += f"_affine_{launch.constants['BV']}" if launch.constants["AFFINE"] else f"_{launch.constants['BV']}"
        yield f"{prefix}/{name}", launch


def _tokens(heads: int, size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(1, 4096, heads, size, dtype=dtype, device="meta")


def plan_training(size: int, mode: str, capability: tuple[int, int]) -> list[Launch]:
    """Plan forward and backward, for a large and for a small batch.

    A small batch has segments and narrow blocks.
    """
    x = _tokens(32, size, torch.float32 if mode == "fp32" else torch.bfloat16)
    inputs = (x, x.float(), x, x, x, x)
    launches = []
    for split in ({}, {"block_v": NARROW, "segments": 2}):
        how = {"precision": mode, "capability": capability, **split}
        forward, (_, _, starts, rows) = plan_forward(*inputs, **how)
        backward, _ = plan_backward(*inputs, None, None, starts, rows, x, None, **how)
        launches += forward[1:] + backward  # the backward begins with a `prepare` that stores more than the forward's
    return launches


def plan_shared(size: int, mode: str, capability: tuple[int, int]) -> list[Launch]:
    """Plan what a backward has more where two heads share a head of v: other launches hardly change."""
    x, shared = (_tokens(heads, size, torch.float32 if mode == "fp32" else torch.bfloat16) for heads in (32, 16))
    inputs, how = (x, x.float(), x, shared, x, x), {"precision": mode, "capability": capability}
    _, (y, _, starts, rows) = plan_forward(*inputs, **how)
    return plan_backward(*inputs, None, None, starts, rows, y, None, **how)[0][-1:]


def plan_packed(size: int, mode: str, capability: tuple[int, int]) -> list[Launch]:
    """Plan inference with several sequences in a row, masked tokens and shared heads."""
    x, shared = _tokens(32, size), _tokens(8, size)
    mask = torch.empty(x.shape[:2], dtype=torch.bool, device="meta")
    bounds = torch.empty(5, dtype=torch.int32, device="meta")
    state = torch.empty(4, 32, size, size, device="meta")
    inputs = (x, x.float(), shared, shared, shared, shared)
    how = {"precision": mode, "capability": capability}
    return plan_forward(*inputs, state, mask, bounds, save=False, **how)[0]


def plan_decoding(size: int, capability: tuple[int, int]) -> list[Launch]:
    """Plan one token for a batch with shared heads and masked rows."""
    x, shared = (torch.empty(8, heads, size, dtype=torch.bfloat16, device="meta") for heads in (32, 8))
    state = torch.empty(8, 32, size, size, device="meta")
    mask = torch.empty(8, dtype=torch.bool, device="meta")
    return plan_step(x, x.float(), shared, shared, shared, shared, state, mask, capability=capability)[0]


def plan_carried(size: int, tokens: int) -> list[Launch]:
    """Plan what an exported model runs without the package, for a batch with shared heads and masked rows."""
    x, shared = (torch.empty(8, tokens, heads, size, dtype=torch.bfloat16, device="meta") for heads in (32, 8))
    state = torch.empty(8, 32, size, size, device="meta")
    mask = torch.empty(8, tokens, dtype=torch.bool, device="meta")
    plan, _ = wkv7_triton.plan(x, x.float(), shared, shared, shared, shared, state, mask)
    return [Launch(*plan, Tuning(wkv7_triton.warps(size), 1))]


def plan_mixing(size: int, capability: tuple[int, int]) -> list[Launch]:
    """Plan one token of a mixer that has everything the kernel knows, in a model of bf16."""
    token = _mixed_token(size)
    bf16 = functools.partial(torch.empty, dtype=torch.bfloat16, device="meta")
    shares = {"v_mix": bf16(8, 8 * size), "v_first": bf16(8, 8, size), "k_mix": bf16(8, 8 * size)}
    shares |= {"k_first": bf16(8, 8, size), "v0": token["w0"][: 8 * size], "k0": token["w0"][: 8 * size]}
    rows = {"mask": torch.empty(8, dtype=torch.bool, device="meta"), "r_k": bf16(32, size)}
    return plan_mixer_step(**token, **shares, **rows, log_scale=True, capability=capability)[0]


def plan_first_mixing(size: int, capability: tuple[int, int]) -> list[Launch]:
    """Plan one token of a first layer, which hands on its key, with an additive value and the decay as it is."""
    given = {"v_mix": torch.empty(8, 32 * size, dtype=torch.bfloat16, device="meta")}
    given["k_out"] = torch.empty(8, 8, size, dtype=torch.bfloat16, device="meta")
    given["r_out"] = torch.empty(8, 32, size, dtype=torch.bfloat16, device="meta")
    return plan_mixer_step(**_mixed_token(size), **given, capability=capability)[0]


def plan_stock_mixing(size: int, capability: tuple[int, int]) -> list[Launch]:
    """Plan one token of stock RWKV-7, all heads with their own keys and values; the largest have no group norm."""
    token = _mixed_token(size)
    for name in ("r_weight", "k_weight", "cos", "sin"):
        del token[name]
    token |= {"k": token["r"], "v": token["r"], "v_first": token["r"], "v_mix": token["gate"], "r_k": token["r"][0]}
    names = ("v0", "k_k", "k_a", *(("ln_weight", "ln_bias") if size <= LARGEST_NORMED else ()))
    return plan_mixer_step(**token, **dict.fromkeys(names, token["w0"]), capability=capability)[0]


def plan_shift(rows: int) -> list[Launch]:
    """Plan the token shift of a token of 2048 columns; of several rows some are masked."""
    x, mix = (torch.empty(count, 2048, dtype=torch.bfloat16, device="meta") for count in (rows, 1))
    mask = torch.empty(rows, dtype=torch.bool, device="meta") if rows > 1 else None
    return plan_shift_step(x, x, [mix] * 6, mask)[0]


def plan_window(size: int) -> list[Launch]:
    """Plan one token of a window of 64 and 4 first tokens, in a model of bf16."""
    bf16 = functools.partial(torch.empty, dtype=torch.bfloat16, device="meta")
    ring, mix = bf16(8, 8, 68, size), torch.empty(32, size, device="meta")
    seen, mask = (torch.empty(8, dtype=dtype, device="meta") for dtype in (torch.int64, torch.bool))
    token = bf16(8, 8, size)
    head = torch.empty(32, device="meta")
    given = bf16(8, 32, size), token, token, bf16(8, 32 * size), ring, ring, seen, mix, mix, 4, mask, mix, head, head
    return plan_window_step(*given)[0]


# How windows may differ from one of 64 tokens and 4 first ones in bf16, with a score for what lies beyond
WINDOW_VARIANTS: dict[str, dict[str, Any]] = {
    "alone": {"sinks": 0, "scored": False},
    "capped": {"softcap": 50.0},
    "fp16": {"dtype": torch.float16},
    "fp32": {"dtype": torch.float32},
}


def plan_windows(
    size: int, *, sinks: int = 4, scored: bool = True, softcap: float = 0.0, dtype: torch.dtype = torch.bfloat16
) -> list[Launch]:
    """Plan attention to windows over sequences, forward and backward, with two heads for each of keys and values."""
    q, k = (_tokens(heads, size, dtype)[0] for heads in (32, 16))
    start, head = torch.empty(len(q), dtype=torch.int64, device="meta"), torch.empty(32, device="meta")
    far = (torch.empty(32, size, device="meta"), head, head) if scored else (None,) * 3
    given = q, k, k, start, None, far, 64, sinks, softcap
    forward, (values, weight, lse) = plan_attend(*given)
    return forward + plan_attend_backward(*given, values, lse, q, weight if scored else None)[0]


# How rotations may differ from that of whole heads in bf16, forward
ROTATION_VARIANTS: dict[str, dict[str, Any]] = {
    "backward": {"transposed": True},
    "part": {"columns": 48},
    "fp16": {"dtype": torch.float16},
    "fp32": {"dtype": torch.float32},
}


def plan_rotation(
    size: int, *, columns: int | None = None, transposed: bool = False, dtype: torch.dtype = torch.bfloat16
) -> list[Launch]:
    """Plan the rotation of queries and keys, with two heads for each of keys; columns: that turn, None: all."""
    q, k = (_tokens(heads, size, dtype).transpose(1, 2) for heads in (32, 16))
    angle = _tokens(1, columns or size, dtype)[:, :, 0]
    return plan_rotate(q, k, angle, angle, transposed)[0]


def plan_maps() -> list[Launch]:
    """Plan the low-rank maps of a mixer of 16 heads of 128 with 8 of keys and values, as in Qwen3-0.6B."""
    bf16 = functools.partial(torch.empty, dtype=torch.bfloat16, device="meta")
    sizes = ((256, 2048), (96, 2048), (160, 2048), (64, 1024), (64, 1024))
    downs, ups = [bf16(1024, rank) for rank, _ in sizes], [bf16(*size) for size in sizes]
    return plan_low_rank(bf16(1, 1024), downs, ups, ("tanh", "none", "sigmoid", "none", "none"))[0]


def _mixed_token(size: int) -> dict[str, torch.Tensor]:
    """Return what every mixer has, with norms and rotation: 8 rows, 32 heads, 8 of keys and values."""
    bf16 = functools.partial(torch.empty, dtype=torch.bfloat16, device="meta")
    token = {"r": bf16(8, 32, size), "k": bf16(8, 8, size), "v": bf16(8, 8, size)}
    token |= {name: bf16(8, 32 * size) for name in ("decay", "iclr", "gate")}
    token |= {name: bf16(size) for name in ("r_weight", "k_weight")} | {name: bf16(1, size) for name in ("cos", "sin")}
    token |= {name: torch.empty(32 * size, device="meta") for name in ("w0", "a0")}
    return token | {"state": torch.empty(8, 32, size, size, device="meta")}


# How a mixer may differ from a later layer of cxa079 in bf16: the first layer in fp32, values mixed at all heads, stock
# RWKV-7
MIXER_VARIANTS = ("first", "full", "stock")


def plan_mixer(size: int, variant: str = "") -> list[Launch]:
    """Plan the work around the recurrence, forward and backward, with two heads for each of keys and values."""
    dtype = torch.float32 if variant == "first" else torch.bfloat16
    full, shared = (_tokens(heads, size, dtype) for heads in (32, 16))
    rotation, norm = _tokens(1, size, torch.float32)[:, :, 0], torch.empty(size, device="meta")
    bias, bias_shared = (torch.empty(heads * size, device="meta") for heads in (32, 16))
    given = {"r": full, "k": shared, "v": shared, "decay": full, "iclr": full, "w0": bias, "a0": bias, "r_k": bias}
    if variant == "stock":
        given |= {"value_gate": full, "k_k": bias, "k_a": bias}
    else:
        given |= {"cos": rotation, "sin": rotation, "r_norm": norm, "k_norm": norm}
    if variant == "full":
        given |= {"value_gate": full, "v_first": shared, "v0": bias}
    elif not variant:
        given |= {"key_gate": shared, "k_first": shared, "k0": bias_shared}
        given |= {"value_gate": shared, "v_first": shared, "v0": bias_shared}
    key_scale = {"stock": "k_a", "full": "log"}.get(variant, "decay")
    forward, made = plan_inputs(given, key_scale=key_scale, hand_key=variant == "first")
    backward, *_ = plan_inputs_backward(given, made, key_scale=key_scale, wanted={"k_first", "v_first"})
    if variant:
        return forward + backward
    last = (full, full, made["bonus"], made["v"], size**-0.5)
    after, out = plan_output(*last)
    return forward + backward + after + plan_output_backward(*last, out)[0]


def plan_mixed(size: int) -> list[Launch]:
    """Plan the output of a mixer with a window and a score, forward and backward."""
    full, shared = (_tokens(heads, size) for heads in (32, 16))
    bonus, mix = full[..., 0].float(), torch.empty(32, size, device="meta")
    last = full, full, bonus, shared, size**-0.5
    mixed = Mixed(full, bonus[..., None], mix, mix)
    forward, out = plan_output(*last, mixed)
    return forward + plan_output_backward(*last, out, mixed)[0]


# What a loss may ask for: distillation as it is by default, and what differs most from it in code
LOSS_VARIANTS: dict[str, dict[str, Any]] = {
    "forward": {"ce": 0.0},
    "forward_warm": {"temperature": 2.0},
    "reverse": {"kind": "reverse"},
    "js": {"kind": "js"},
    "js_fp32": {"kind": "js", "temperature": 2.0},
    "evaluated": {"need_grad": False},
    "labels": {"kl": 0.0},
}


def plan_loss(variant: str) -> list[Launch]:
    """Plan a loss of a chunk of positions of a vocabulary of 152k; "labels" is without a teacher."""
    dtype = torch.float32 if variant.endswith("fp32") else torch.bfloat16
    logits = torch.empty(331, 151_936, dtype=dtype, device="meta")
    labels = torch.empty(331, dtype=torch.int64, device="meta")
    teacher = None if variant == "labels" else logits
    return plan_compare(logits, labels, teacher, **LOSS_VARIANTS[variant])[0]


def plan_layer_error(width: int, dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    """Plan the error of a layer's output to its target, forward and backward, with masked tokens."""
    output, mask = _tokens(1, width, dtype)[:, :, 0], torch.empty(1, 4096, dtype=torch.bool, device="meta")
    forward, (_, difference) = plan_error(output, output, mask, keep=True)
    dvalue = torch.empty((), device="meta")
    return forward + plan_error_backward(difference, dvalue)[0]


def survey(only: str = "") -> dict[str, Usage]:
    """Compile the launches that `shipped` yields; print a line for each.

    Each architecture has its own process (they share no kernels), as many at a time as there are processors.

    Args:
        only: beginning of the names to compile.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("nothing is compiled under Triton's interpreter: unset TRITON_INTERPRET")
    workers = min(len(ARCHITECTURES), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        parts = pool.map(_survey, ARCHITECTURES, itertools.repeat(only))
        return {name: usage for part in parts for name, usage in part.items()}


def _survey(architecture: int, only: str) -> dict[str, Usage]:
    """Do the part of `survey` for one architecture.

    Triton is set up for an absent GPU and stays so: the process cannot launch kernels afterwards.
    """
    knobs = triton.knobs
    triton.runtime.driver.set_active(_AbsentGPU(architecture))
    knobs.compilation.always_compile = True
    knobs.nvidia.dump_ptxas_log = True
    found: dict[str, Usage] = {}
    compiled: dict[str, Usage] = {}  # modes share kernels, which Triton then compiles only once
    with tempfile.TemporaryDirectory() as knobs.cache.dir:
        for name, launch in shipped(architecture):
            if not name.startswith(only) or name in found:  # a repeated launch
                continue
            log = io.StringIO()
            with contextlib.redirect_stdout(log):
                kernel = launch.compile()
            if kernel.hash not in compiled:
                compiled[kernel.hash] = _usage(log.getvalue(), kernel)
            found[name] = compiled[kernel.hash]
            print(f"{name:44} {_words(found[name])}", flush=True)
    return found


def problems(found: dict[str, Usage]) -> list[str]:
    """Return one line for each kernel that no GPU should run.

    These spill, fall back to 32 registers, or need too much memory.
    """
    lines = []
    for name, usage in found.items():
        limit = SHARED_LIMIT[int(re.match(r"sm_(\d+)/", name)[1])]
        if usage.spill > SPILL_LIMIT:
            lines.append(f"{name}: spills {usage.spill} bytes, the limit is {SPILL_LIMIT}")
        if usage.registers <= 32 and usage.spill:
            lines.append(f"{name}: ptxas fell back to {usage.registers} registers, spilling {usage.spill} bytes")
        if usage.shared > limit:
            lines.append(f"{name}: {usage.shared} bytes of shared memory per block, the architecture has {limit}")
    return lines


def differences(found: dict[str, Usage], baseline: dict[str, Usage]) -> list[str]:
    """Return one line for each kernel that differs from the baseline.

    It is new, gone, or differs by more than `TOLERANCE`.
    """
    lines = [f"{name}: in the baseline, no longer compiled" for name in baseline.keys() - found.keys()]
    for name, usage in found.items():
        if name not in baseline:
            lines.append(f"{name}: not in the baseline")
        elif any(abs(getattr(usage, key) - getattr(baseline[name], key)) > TOLERANCE[key] for key in TOLERANCE):
            lines.append(f"{name}: {_words(usage)}; the baseline has {_words(baseline[name])}")
    return sorted(lines)


def _words(usage: Usage) -> str:
    return (
        f"{usage.registers:3} registers, {usage.spill:5} B spilled, {usage.shared / 1024:5.1f} KiB shared, "
        f"{usage.mma:4} MMAs, {usage.ahead:2} copies ahead"
    )


def source_hash() -> str:
    """Return a hash of the code and the tables that, with Triton, decide the result."""
    digest = hashlib.sha256()
    for file in (*sorted(Path(__file__).parent.iterdir()), Path(wkv7_triton.__file__)):
        if file.suffix in (".py", ".json"):
            text = file.read_text(encoding="utf-8")
            digest.update(f"{file.name}\0{_code(text) if file.suffix == '.py' else text}".encode())
    return digest.hexdigest()[:16]


def _code(text: str) -> str:
    """Return Python code without its comments and docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            text_only = [isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant) for each in body]
            node.body = [each for each, is_text in zip(body, text_only, strict=True) if not is_text]
    return ast.unparse(tree)


def is_current(path: Path) -> bool:
    """Return whether a baseline was written with these sources and this Triton."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["sources"] == source_hash() and triton.__version__ in content["triton"]


def read_baseline(path: Path) -> dict[str, dict[str, Usage]]:
    """Return usages by name, by the version of Triton that gave them."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return {
        version: {name: Usage(**usage) for name, usage in kernels.items()}
        for version, kernels in content["triton"].items()
    }


def write_baseline(path: Path, found: dict[str, Usage]) -> None:
    """Write usages by name, one per line, with the sources' hash and Triton's version.

    What another Triton gave stays if it was of these sources.
    """
    versions = {}
    if path.exists() and json.loads(path.read_text(encoding="utf-8"))["sources"] == source_hash():
        versions = read_baseline(path)
    versions[triton.__version__] = found
    parts = []
    for version, usages in sorted(versions.items()):
        lines = ",\n".join(f"      {json.dumps(name)}: {json.dumps(asdict(usage))}" for name, usage in usages.items())
        parts.append(f"    {json.dumps(version)}: {{\n{lines}\n    }}")
    text = ",\n".join(parts)
    write_text(path, f'{{\n  "sources": "{source_hash()}",\n  "triton": {{\n{text}\n  }}\n}}\n')


def main(arguments: list[str] | None = None) -> int:
    """Compile and check or write a baseline.

    Returns:
        0 if all is well, 1 if a limit is broken or the baseline differs, 2 if that is not possible.
    """
    parser = argparse.ArgumentParser(
        prog="python -m rwkvinside.kernels.gpu.compile", description=__doc__.split("\n")[0]
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", type=Path, metavar="BASELINE", help="fail on a difference from this file")
    action.add_argument("--write", type=Path, metavar="BASELINE", help="write this file")
    parser.add_argument("--only", default="", metavar="PREFIX", help="names to compile, e.g. sm_90/64/balanced")
    args = parser.parse_args(arguments)
    if args.write and args.only:
        parser.error("--write needs every kernel: leave out --only")
    try:
        known = read_baseline(args.check) if args.check else {}
        found = survey(args.only)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        print(f"cannot check the kernels: {error}", file=sys.stderr)
        return 2
    lines = problems(found)
    if args.check and (baseline := known.get(triton.__version__)) is not None:
        lines += differences(found, {name: usage for name, usage in baseline.items() if name.startswith(args.only)})
    elif args.check:
        print(f"the baseline is of Triton {', '.join(known)}, this is {triton.__version__}: only limits are checked")
    for line in lines:
        print(line, file=sys.stderr)
    if args.write and not lines:
        write_baseline(args.write, found)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
