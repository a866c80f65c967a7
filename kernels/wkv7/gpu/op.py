"""WKV-7 training in Triton as PyTorch ops: which kernels run, on which buffers, and what autograd sees.

`plan_forward` and `plan_backward` describe launches without launching them, so that they can be compiled for an absent
GPU; the custom ops run them. The algebra is in `kernels.py`, tile sizes are in `table.py`.

    forward     prepare, scan_forward
    backward    prepare (again: cheaper than keeping its tiles), scan_backward, gradient, sum_heads where heads share

A scan that would leave most of a GPU idle is cut into segments: the affine map of every segment first, all at the same
time, then the states between the segments, then all segments from their true states.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from rwkvinside.kernels.gpu import kernels
from rwkvinside.kernels.gpu.launch import Launch, capability, run
from rwkvinside.kernels.gpu.table import PRECISIONS, Config, Tuning, lookup


class _Mode(NamedTuple):
    """Precision of each kind of product.

    "bf16" rounds both operands, "bf16x3" takes three products of bf16 (errors near 2^-16), "bf16x6" six (fp32). The
    interpreter computes the latter two in fp32.
    """

    local: str  # within a chunk
    square: str  # within a chunk, of [L, L] with [L, L]: the triangular inverse, which in bf16 repeated keys spoil
    state: str  # with v or the state
    final: str  # of the gradients within a chunk
    storage: torch.dtype  # of tiles and saved states
    values: torch.dtype  # of the rows that b writes and their gradients


_MODES = {
    "fp32": _Mode("bf16x6", "bf16x6", "bf16x6", "bf16x6", torch.float32, torch.float32),
    "high": _Mode("bf16x3", "bf16x3", "bf16", "bf16x3", torch.bfloat16, torch.float32),
    "balanced": _Mode("bf16x3", "bf16x3", "bf16", "bf16", torch.bfloat16, torch.bfloat16),
    "fast": _Mode("bf16", "bf16x3", "bf16", "bf16", torch.bfloat16, torch.bfloat16),
}
NARROW = 16  # rows of the state per program of a scan that has few heads: the least that a product takes
MAX_LENGTH = 32  # tokens per chunk: with 64, exponents of log decays near -5 leave fp32


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    precision: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute the WKV-7 recurrence as `rwkvinside.modeling.wkv7` defines it.

    Source: RWKV-7 "Goose", arXiv 2503.14456, eq. 1-3.

    Args:
        r: (B, T, H, N), bf16, fp16 or fp32; N a multiple of 8 from 8 to 256.
        w: (B, T, H, N), log decay from -5 to 0, fp32 advised. Values are not checked, which would wait for the GPU.
        k, v, a, b: (B, T, H, N), or (B, T, G, N) each with G dividing H: head h reads head h // (H / G).
        state: initial state (B, H, N, N) as (value, key), or (S, H, N, N) with `cu_seqlens`; None is zero.
        mask: (B, T) bool, True for real tokens. A masked step does not change the state, outputs 0 and gets gradient 0.
        cu_seqlens: (S + 1,) int32 or int64 on the device: sequence s is [cu[s], cu[s+1]); needs B = 1. It is read on
            the device only. Tokens from cu[S] on get zeros.
        precision: "fp32", "high", "balanced", "fast", or "auto": see `resolve_precision`. Where it is not fp32, r, k,
            v, a and b are read in bf16: what comes in fp32 (norms and rotations under autocast) is cast once.

    Returns:
        y (B, T, H, N) in v's dtype and the final state (B or S, H, N, N) in fp32. Both carry gradient to all inputs
        and the initial state; there is no second derivative.

    Raises:
        ValueError: shapes, dtypes or a precision that do not fit.
        RuntimeError: tensors that are not on a GPU, except in Triton's interpreter.
    """
    precision = resolve_precision(precision, v)
    _check(r, w, k, v, a, b, state, mask, cu_seqlens, precision)
    if precision != "fp32":
        r, k, v, a, b = (x.to(torch.bfloat16) if x.dtype == torch.float32 else x for x in (r, k, v, a, b))
    inputs = (r, w, k, v, a, b, state)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    y, final, _, _ = _forward(*inputs, mask, cu_seqlens, precision, save)
    return y, final


def resolve_precision(precision: str, v: Tensor) -> str:
    """Return the mode that "auto" stands for: fp32 where the model computes in fp32, else balanced.

    Under autocast its dtype decides, otherwise that of v, which comes from a product without a norm or rotation.
    """
    if precision != "auto":
        return precision
    device = v.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else v.dtype
    return "fp32" if compute == torch.float32 else "balanced"


def plan_forward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    precision: str,
    capability: tuple[int, int] | None,
    config: Config | None = None,
    block_v: int | None = None,
    segments: int = 1,
    save: bool = True,
) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return the launches of a forward pass and their outputs; launch nothing.

    Meta tensors are enough.

    Args:
        r, w, k, v, a, b, state, mask, cu_seqlens: as in `wkv7`.
        precision: "fp32", "high", "balanced" or "fast".
        capability: compute capability to plan for; None is Triton's interpreter.
        config: replaces the table's.
        block_v: rows of the state held by one program of a scan; None is the configuration's.
        segments: pieces that every sequence is cut into for the scan; must be 1 with `cu_seqlens`.
        save: whether a backward will follow.

    Returns:
        Launches in order, and (y, final state, states before the chunks (chunks, H, K, K), rows that b writes (chunks,
        H, L, K)), K being N padded to a power of two; the last two are empty without `save`.
    """
    plan = _Plan((r, w, k, v, a, b), mask, cu_seqlens, precision, capability, config, block_v)
    tiles = plan.tiles("Z", "T") if save else plan.tiles("Z")
    final = plan.empty(plan.sequences, plan.heads, plan.size, plan.size)
    y = plan.per_token(v.dtype)
    starts, u = plan.empty(0), plan.empty(0)  # (outputs of an op may not share memory)
    if save:
        starts = plan.per_chunk(plan.padded, plan.padded, dtype=plan.mode.storage)
        u = plan.per_chunk(plan.length, plan.padded, dtype=plan.mode.values)
    scan = plan.scan(
        kernels.scan_forward,
        {**plan.input("v"), **{name: tiles[name] for name in ("Q_", "W_", "Kp_", "Bg_", "Z_", "C_", "T_")}},
        {"y_": y, "starts_": starts if save else None, "U_": u if save else None},
        ("initial_", state, "final_", final),
        range(segments),
    )
    return [plan.prepare(tiles), *scan], (y, final, starts, u)


def plan_backward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    starts: Tensor,
    u: Tensor,
    dy: Tensor,
    dfinal: Tensor | None,
    *,
    precision: str,
    capability: tuple[int, int] | None,
    config: Config | None = None,
    block_v: int | None = None,
    segments: int = 1,
    within: bool = True,
) -> tuple[list[Launch], tuple[Tensor, ...]]:
    """Return the launches of a backward pass and their outputs; launch nothing.

    Args:
        r, w, k, v, a, b, mask, cu_seqlens: as in `wkv7`.
        starts, u: the last two outputs of the forward, planned with the same precision, capability and config.
        dy, dfinal: gradients of y and of the final state; None for the latter is zero.
        precision, capability, config, block_v, segments: as in `plan_forward`.
        within: whether any of r, w, k, a and b needs its gradient, which is half of the work.

    Returns:
        Launches in order, and the gradients of r, w, k, v, a, b in their shapes and dtypes and of the initial state in
        fp32; those of r, w, k, a and b have no elements without `within`.

    Raises:
        ValueError: a forward that was planned differently, or without `save`.
    """
    plan = _Plan((r, w, k, v, a, b), mask, cu_seqlens, precision, capability, config, block_v)
    tiles = plan.tiles("Z", "X", "RX")
    dy = _strided("dy", dy)
    p = plan.per_chunk(plan.length, plan.padded, dtype=plan.mode.values)
    ends = plan.per_chunk(plan.padded, plan.padded, dtype=plan.mode.storage)
    if starts.shape != ends.shape or u.shape != p.shape:
        raise ValueError(f"the forward has kept {tuple(starts.shape)}, this backward reads {tuple(ends.shape)}")
    dstate = plan.empty(plan.sequences, plan.heads, plan.size, plan.size)
    of_heads, grads, sums = plan.gradients("rwkvab" if within else "v")
    scan = plan.scan(
        kernels.scan_backward,
        {**dy, **{name: tiles[name] for name in ("Q_", "W_", "Kp_", "Bg_", "Z_", "C_", "X_", "RX_")}},
        {"ends_": ends, "P_": p, "dv_": of_heads.pop("dv_")},
        ("dfinal_", dfinal, "dinitial_", dstate),
        range(segments)[::-1],
    )
    if not within:
        return [plan.prepare(tiles), *scan, *sums], (*grads, dstate)
    columns = min(plan.config.grad_block_k, plan.padded)
    rows = min(plan.config.grad_block_v, plan.padded)
    gradient = plan.launch(
        kernels.gradient,
        (plan.chunks * (plan.padded // columns), plan.heads),
        {
            **plan.input("r", "w", "k", "v", "a", "b"),
            **dy,
            "chunks_": plan.chunk_table,
            "starts_": starts,
            "U_": u,
            "ends_": ends,
            "P_": p,
            **of_heads,
        },
        {"BK": columns, "BV": rows, "UNROLL": plan.unroll(rows), "STATE": plan.mode.state, "FINAL": plan.mode.final},
        plan.config.grad,
    )
    return [plan.prepare(tiles), *scan, gradient, *sums], (*grads, dstate)


def _strided(name: str, x: Tensor) -> dict[str, Any]:
    """Return a token tensor (B, T, heads, N) as the kernels take it."""
    x = x if x.stride(3) == 1 else x.contiguous()
    return {f"{name}_": x, f"{name}_b": x.stride(0), f"{name}_t": x.stride(1), f"{name}_h": x.stride(2)}


class _Plan:
    """Sizes, common arguments, buffers and launches of a pass.

    Attributes:
        size: N.
        padded: N padded to a power of two.
        length: tokens per chunk.
        sequences: rows of the batch, or packed sequences.
        chunks: of all sequences (with cu_seqlens an upper bound).
    """

    def __init__(self, inputs: Sequence[Tensor], mask, cu_seqlens, precision, capability, config, block_v):
        self.tokens = dict(zip("rwkvab", inputs, strict=True))
        r = self.tokens["r"]
        self.batch, self.time, self.heads, self.size = r.shape
        self.device = r.device
        self.padded = _padded(self.size)
        self.mode = _MODES[precision]
        self.config = config or lookup(self.padded, capability, precision)
        self.length = self.config.length
        if self.length > MAX_LENGTH:
            raise ValueError(f"chunks of {self.length} tokens: exponents leave fp32 beyond {MAX_LENGTH}")
        self.block_v = min(block_v or self.config.block_v, self.padded)
        # (bool loads differ between the interpreter and the compiler)
        mask = None if mask is None else mask.contiguous().view(torch.uint8)
        self.where = {"mask_": mask, "mask_b": None if mask is None else mask.stride(0)}
        self.cu_seqlens = cu_seqlens
        per_row = triton.cdiv(self.time, self.length)
        if cu_seqlens is None:
            self.sequences, self.chunks = self.batch, self.batch * per_row
            self.first_chunk = self.chunk_table = None
        else:
            self.sequences = cu_seqlens.shape[0] - 1
            self.chunks = per_row + self.sequences
            self.first_chunk, self.chunk_table = _chunk_table(cu_seqlens, self.chunks, self.length)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return an uninitialized buffer."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def per_chunk(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Return an uninitialized buffer (chunks, H, rows, columns)."""
        return self.empty(self.chunks, self.heads, rows, columns, dtype=dtype)

    def per_token(self, dtype: torch.dtype) -> Tensor:
        """Return a buffer (B, T, H, N); zeros if tokens may belong to no sequence."""
        shape = (self.batch, self.time, self.heads, self.size)
        return (torch.empty if self.cu_seqlens is None else torch.zeros)(shape, dtype=dtype, device=self.device)

    def gradients(self, wanted: str) -> tuple[dict[str, Tensor], list[Tensor], list[Launch]]:
        """Return buffers (B, T, H, N) for the gradients of the wanted inputs, and what becomes of them.

        Returns:
            The buffers as the kernels take them; the gradients of all inputs, which are those buffers except where
            heads share an input, without elements where they are not wanted; the launches that sum over such heads.
        """
        buffers, grads, sums = {}, [], []
        for name, x in self.tokens.items():
            shared = x.shape[2] != self.heads
            if name not in wanted:
                grads.append(self.empty(0, dtype=x.dtype))
                continue
            # In the modes that round gradients what is still to be summed is rounded too: half the bytes
            dtype = torch.float32 if shared and self.mode.final != "bf16" else x.dtype
            buffers[f"d{name}_"] = grad = self.per_token(dtype)
            if shared:
                grad = self.empty(*x.shape, dtype=x.dtype)
                sums.append(self._sum_heads(buffers[f"d{name}_"], grad))
            grads.append(grad)
        return buffers, grads, sums

    def _sum_heads(self, grads: Tensor, sums: Tensor) -> Launch:
        groups, block = sums.shape[:3].numel(), 2048
        constants = {"R": self.heads // sums.shape[2], "D": self.size, "BLOCK": block}
        args = {"grads_": grads, "sums_": sums, "groups": groups}
        return Launch(kernels.sum_heads, (triton.cdiv(groups, block // self.size),), args, constants, Tuning(4, 1))

    def tiles(self, *squares: str) -> dict[str, Tensor | None]:
        """Return buffers for `prepare`: Q, W, Kp, Bg and C, and the named of Z, T, X, RX."""
        tiles: dict[str, Tensor | None] = {"T_": None, "X_": None, "RX_": None}
        tiles |= {f"{name}_": self.per_chunk(self.length, self.length, self.mode.storage) for name in squares}
        for name in ("Q_", "W_", "Kp_", "Bg_"):
            tiles[name] = self.per_chunk(self.length, self.padded, self.mode.storage)
        return tiles | {"C_": self.empty(self.chunks, self.heads, self.padded)}

    def input(self, *names: str) -> dict[str, Any]:
        """Return the arguments for some of the inputs, with their strides and head groups."""
        args = {}
        for name in names:
            args |= _strided(name, self.tokens[name])
            if name in "kvab":
                args[f"{name}_group"] = self.heads // self.tokens[name].shape[2]
        return args

    def launch(self, kernel, grid: tuple[int, ...], args: dict[str, Any], constants: dict[str, Any], tuning) -> Launch:
        """Return a launch with the arguments that all kernels take."""
        args = {**args, **self.where, "T": self.time, "H": self.heads}
        constants = {"D": self.size, "K": self.padded, "L": self.length, **constants}
        return Launch(kernel, grid, args, constants, tuning)

    def unroll(self, block: int) -> int:
        """Return how many blocks of columns or rows a kernel processes without a loop.

        These are all of them, except for fp32: six products for one make code that takes minutes to compile.
        """
        return 1 if self.mode.local == "bf16x6" else self.padded // block

    def parts(self, columns: int, tuning: Tuning) -> int:
        """Return into how many parts products over so many columns are cut.

        For fp32 there is one part for each warp if products keep their least size; bf16 operands fit without.
        """
        return tuning.num_warps if self.mode.local == "bf16x6" and columns >= 16 * tuning.num_warps else 1

    def prepare(self, tiles: dict[str, Tensor | None]) -> Launch:
        """Return the launch that computes the tiles."""
        columns = min(self.config.prep_block_k, self.padded)
        constants = {"BK": columns, "LOCAL": self.mode.local, "SQUARE": self.mode.square}
        constants |= {"UNROLL": self.unroll(columns), "PARTS": self.parts(columns, self.config.prep)}
        return self.launch(
            kernels.prepare,
            (self.chunks, self.heads),
            {**self.input("r", "w", "k", "a", "b"), "chunks_": self.chunk_table, **tiles},
            constants,
            self.config.prep,
        )

    def scan(self, kernel, reads: dict, writes: dict, ends: tuple, order: Sequence[int]) -> list[Launch]:
        """Return the launches of a scan over the segments in `order`.

        Args:
            kernel: `scan_forward` or `scan_backward`.
            reads, writes: its arguments.
            ends: names and tensors of the state it starts from (None is zero) and of the one it arrives at.
            order: of the segments.
        """
        first, start, last, arrival = ends
        reads = {**reads, "cu_": self.cu_seqlens, "first_": self.first_chunk, "SEGMENTS": len(order)}
        tuning = self.config.scan if self.block_v == self.config.block_v else self.config.narrow
        parts = self.parts(self.padded, tuning)
        constants = {"BV": self.block_v, "STATE": self.mode.state, "PARTS": parts, "STAGES": tuning.num_stages}
        programs = self.sequences * len(order) * self.heads * (self.padded // self.block_v)
        start = None if start is None else start.float().contiguous()
        launches = []
        if len(order) > 1:
            matrix = (self.heads, self.size, self.size)
            between = torch.zeros((self.batch, len(order), *matrix), device=self.device)
            if start is not None:
                between[:, order[0]] = start
            affine = self.empty(self.batch, len(order), self.heads, 2, self.size, self.size)
            nothing = dict.fromkeys(writes) | {first: None, last: affine}
            launches.append(
                self.launch(kernel, (2 * programs,), {**reads, **nothing}, {**constants, "AFFINE": True}, tuning)
            )
            for here, there in pairwise(order):
                launches.append(self._advance(between[:, here], affine[:, here], between[:, there]))
            start = between
        args = {**reads, **writes, first: start, last: arrival}
        launches.append(self.launch(kernel, (programs,), args, {**constants, "AFFINE": False}, tuning))
        return launches

    def _advance(self, before: Tensor, affine: Tensor, after: Tensor) -> Launch:
        block = 32
        tensors = {"before_": before, "affine_": affine, "after_": after}
        args = tensors | {f"{name}b": x.stride(0) for name, x in tensors.items()} | {"H": self.heads}
        blocks = triton.cdiv(self.size, block)
        constants = {"D": self.size, "BLOCK": block}
        return Launch(kernels.advance, (self.batch * self.heads, blocks, blocks), args, constants, Tuning(4, 1))


def _chunk_table(cu_seqlens: Tensor, chunks: int, length: int) -> tuple[Tensor, Tensor]:
    """Locate the chunks of packed sequences.

    Sizes do not depend on the values, so nothing waits for the device; surplus chunks are empty. All layers of a
    forward read the same `cu_seqlens`, and so do their backwards: what was found is kept with that tensor, as long as
    it lives and nobody writes to it.

    Returns:
        The first chunk of every sequence (S,), and (first token, end of the sequence) of every chunk (chunks, 2), both
        int64.
    """
    if cu_seqlens.is_inference() or cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing():
        return _locate_chunks(cu_seqlens, chunks, length)  # no record of writes; a graph's replays bring other values
    asked = (cu_seqlens._version, chunks, length)
    known, table = _chunk_tables.get(cu_seqlens, (None, None))
    if known != asked:
        table = _locate_chunks(cu_seqlens, chunks, length)
        _chunk_tables[cu_seqlens] = asked, table
    return table


_chunk_tables = WeakTensorKeyDictionary()


def _locate_chunks(cu_seqlens: Tensor, chunks: int, length: int) -> tuple[Tensor, Tensor]:
    bounds = cu_seqlens.long()
    counts = (bounds.diff() + length - 1).div(length, rounding_mode="floor")
    ends = counts.cumsum(0)
    first = ends - counts
    index = torch.arange(chunks, device=cu_seqlens.device)
    sequence = torch.searchsorted(ends, index, right=True).clamp(max=counts.shape[0] - 1)
    start = bounds[sequence] + (index - first[sequence]) * length
    return first, torch.stack([start, bounds[sequence + 1]], 1)


def choose_split(states: int, chunks: int, padded: int, config: Config, processors: int) -> tuple[int, int]:
    """Return the rows of the state per program and the segments of a scan.

    Wide blocks of rows read every tile fewer times and are preferred; narrow ones make more programs from few heads.
    With segments, every chunk is scanned three times (twice for the affine map, once for the outputs) in two passes:
    this pays from four segments on, if about one processor is free for each of them.

    Args:
        states: sequences times heads.
        chunks: of each sequence; 0 allows no segments.
        padded: head size, padded to a power of two.
        config: of the kernels.
        processors: multiprocessors of the GPU.
    """
    if states * triton.cdiv(padded, config.block_v) >= processors:
        return config.block_v, 1
    segments = min(processors // max(1, states * (padded // NARROW)), chunks // 64, 16)
    return NARROW, segments if segments >= 4 else 1


def _split(r: Tensor, cu_seqlens: Tensor | None, precision: str) -> dict[str, Any]:
    """Return the options of a plan for the device of r."""
    found = capability(r.device)
    options = {"precision": precision, "capability": found}
    if found is None:
        return options
    B, T, H, N = r.shape
    padded = _padded(N)
    config = lookup(padded, found, precision)
    processors = torch.cuda.get_device_properties(r.device).multi_processor_count
    sequences, chunks = (B, T // config.length) if cu_seqlens is None else (cu_seqlens.shape[0] - 1, 0)
    block_v, segments = choose_split(sequences * H, chunks, padded, config, processors)
    return {**options, "block_v": block_v, "segments": segments}


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


@torch.library.custom_op("rwkvinside::wkv7_triton", mutates_args=())
def _forward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    precision: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    launches, outputs = plan_forward(
        r, w, k, v, a, b, state, mask, cu_seqlens, save=save, **_split(r, cu_seqlens, precision)
    )
    run(launches, r.device)
    return outputs


@_forward.register_fake
def _(r, w, k, v, a, b, state, mask, cu_seqlens, precision, save):
    mode = {"precision": precision, "capability": capability(r.device), "save": save}
    return plan_forward(r, w, k, v, a, b, state, mask, cu_seqlens, **mode)[1]


@torch.library.custom_op("rwkvinside::wkv7_triton_backward", mutates_args=())
def _backward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    starts: Tensor,
    u: Tensor,
    dy: Tensor,
    dfinal: Tensor | None,
    precision: str,
    within: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = {"within": within, **_split(r, cu_seqlens, precision)}
    launches, grads = plan_backward(r, w, k, v, a, b, mask, cu_seqlens, starts, u, dy, dfinal, **options)
    run(launches, r.device)
    return grads


@_backward.register_fake
def _(r, w, k, v, a, b, mask, cu_seqlens, starts, u, dy, dfinal, precision, within):
    inputs = zip("rwkvab", (r, w, k, v, a, b), strict=True)
    grads = [x.new_empty(x.shape if within or name == "v" else 0) for name, x in inputs]
    sequences = r.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return *grads, r.new_empty((sequences, r.shape[2], r.shape[3], r.shape[3]), dtype=torch.float32)


def _setup_context(ctx, inputs, output) -> None:
    r, w, k, v, a, b, state, mask, cu_seqlens, ctx.precision, _ = inputs
    _, _, starts, u = output
    ctx.set_materialize_grads(False)  # no zeros for the gradients of starts and u, which are only saved
    ctx.save_for_backward(r, w, k, v, a, b, mask, cu_seqlens, starts, u)
    ctx.state_dtype = None if state is None else state.dtype


def _differentiate(ctx, dy, dfinal, _starts, _u):
    dy = torch.zeros_like(ctx.saved_tensors[0]) if dy is None else dy
    wanted = ctx.needs_input_grad
    within = any(needed for name, needed in zip("rwkvab", wanted[:6], strict=True) if name != "v")
    *grads, dstate = _backward(*ctx.saved_tensors, dy, dfinal, ctx.precision, within)
    grads = [grad if needed else None for grad, needed in zip(grads, wanted[:6], strict=True)]
    dstate = None if ctx.state_dtype is None else dstate.to(ctx.state_dtype)
    return *grads, dstate, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def _check(r, w, k, v, a, b, state, mask, cu_seqlens, precision) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: choose auto or one of {', '.join(PRECISIONS)}")
    if r.dim() != 4 or r.shape[1] == 0 or r.shape[3] % 8 or not 8 <= r.shape[3] <= 256:
        raise ValueError(
            f"r has shape {tuple(r.shape)}, expected (B, T, H, N) with T > 0 and N a multiple of 8 from 8 to 256"
        )
    B, T, H, N = r.shape
    sequences = B
    if w.shape != r.shape:
        raise ValueError(f"w has shape {tuple(w.shape)}, r has {tuple(r.shape)}: they must agree")
    for name, x in (("k", k), ("v", v), ("a", a), ("b", b)):
        if x.dim() != 4 or x.shape[:2] != r.shape[:2] or x.shape[3] != N or x.shape[2] == 0 or H % x.shape[2]:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {(B, T, H, N)} or heads that divide {H}")
    for name, x in (("r", r), ("w", w), ("k", k), ("v", v), ("a", a), ("b", b)):
        if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"{name} is {x.dtype}: the kernels take bfloat16, float16 and float32")
    if cu_seqlens is not None:
        if B != 1:
            raise ValueError(f"cu_seqlens needs a batch of 1 (concatenate the rows), got {B}")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"cu_seqlens has shape {tuple(cu_seqlens.shape)} and {cu_seqlens.dtype}, expected (S + 1,) integers"
            )
        sequences = cu_seqlens.shape[0] - 1
    if state is not None and state.shape != (sequences, H, N, N):
        raise ValueError(f"state has shape {tuple(state.shape)}, expected {(sequences, H, N, N)}")
    if mask is not None and (mask.shape != (B, T) or mask.dtype != torch.bool):
        raise ValueError(f"mask has shape {tuple(mask.shape)} and {mask.dtype}, expected {(B, T)} of bool")
    if r.device.type != "cuda" and not kernels.INTERPRETED.value:
        raise RuntimeError(f"the Triton kernels need a CUDA device, r is on {r.device}")
