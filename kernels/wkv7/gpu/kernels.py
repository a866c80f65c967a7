"""The Triton kernels of WKV-7 training: `prepare`, `scan_forward`, `scan_backward`, `gradient`, `sum_heads`, `advance`.

They only compute; `op.py` decides which of them run, in which order and on which buffers. docs/wkv7.md has the
derivation. For one chunk of L tokens and one head, with S the state before the chunk, C the decay of the whole chunk,
c_t the decay from the middle of the chunk to the end of token t, e and g the decays from its start to its middle and
from its middle to its end (rows are tokens, products with decays are elementwise):

    A = a c_{t-1}   R = r c_t   K = k / c_t   B = b / c_t           X = (I - tril(A B', -1))^-1
    RX = tril(R B') X   T = X tril(A K', -1)   Z = tril(R K') + RX tril(A K', -1)
    W = X A e   Q = (R + RX A) e   Bg = B g   Kp = (K + T' B) g
    forward     y = Q S' + Z V           U = W S' + T V                 S <- S C + (W S')' Bg + V' Kp
    backward    P = X' E + RX' dY        dV = Z' dY + Kp D'             D <- D C + E' W + dY' Q     with E = Bg D'

where D is the gradient of the state after the chunk, U holds the rows that `b` writes into the state and P is the
gradient of U. Nothing but U, P, S and D couples the columns of r, w, k, a, b, so `gradient` works on any block of them.
The recurrence over chunks touches only precomputed tiles; cancellation (repeated keys) stays inside `prepare`, which
computes in more than bf16.

Token tensors are (batch, token, head, column) with any strides and contiguous columns. Chunk buffers are (chunk, head,
row, column), contiguous, padded with zeros to K columns. `D` is the head size, `K` that size padded to a power of two.

Triton lays out all products of a loop body (or of the code outside of loops) that operands connect as it lays out the
last of them. A last one of [L, columns] spreads the warps over columns; after one of [L, L] they all compute the same.
Hence the order of products, and loops unrolled into code that ends with a wide one. Where six products stand for one
(fp32), unrolled code would take minutes to compile, the time growing with its cube: there loops are real (UNROLL is 1),
and products whose sum the warps share (PARTS) leave no choice of layout.

Triton's interpreter multiplies the bit patterns of bf16 operands and truncates when it casts to bf16: there (and only
there) operands are rounded by integer arithmetic and multiplied as fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2_E = tl.constexpr(1.4426950408889634)
# Plain numbers that change from call to call: no specialized variant of a kernel for each
RUNTIME = ["T", "mask_b", "groups"]


@triton.jit
def _round_to_bf16(x):
    """Round fp32 to the nearest bf16 (ties to even), still as fp32."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _operand(x, MODE: tl.constexpr):
    """Return x as a product of this mode reads it."""
    if MODE == "bf16":
        if INTERPRETED:
            return _round_to_bf16(x.to(tl.float32))
        else:
            return x.to(tl.bfloat16)
    else:
        return x.to(tl.float32)


@triton.jit
def _split_off(x):
    """Return the leading 8 bits of fp32 x as an operand, and what is missing, in fp32.

    Cut off, not rounded: conversions of single numbers share the unit of exp2, at a quarter of the rate.
    """
    bits = x.to(tl.uint32, bitcast=True)
    high = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    if INTERPRETED:
        return high, x - high
    else:
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), x - high


@triton.jit
def _high_and_low(x):
    """Return two operands of bf16 that together are x to 2^-17."""
    high, rest = _split_off(x.to(tl.float32))
    return high, _operand(rest, "bf16")


@triton.jit
def _signed_sums(signs, x):
    """Return signs x in fp32, for a matrix of 1, 0 and -1.

    Three parts of bf16 hold an fp32 number, and products with signs are exact. In place of tl.cumsum, which takes five
    shuffles and as many additions for every number.
    """
    signs = _operand(signs, "bf16")
    x = x.to(tl.float32)
    high, x = _split_off(x)
    middle, x = _split_off(x)
    return tl.dot(signs, high, tl.dot(signs, middle, tl.dot(signs, _operand(x, "bf16"))))


@triton.jit
def _dot(x, y, MODE: tl.constexpr):
    """Multiply matrices with fp32 accumulation.

    MODE is "bf16", or "bf16x3" or "bf16x6" for so many products of bf16 parts (Triton's fp32 products without tensor
    cores spill kilobytes of registers here). The three are written out: Triton's own would split an operand anew in
    every product and look for NaN each time, which makes twice the instructions.
    """
    if MODE == "bf16x3":
        x_high, x_low = _high_and_low(x)
        y_high, y_low = _high_and_low(y)
        return tl.dot(x_high, y_high, tl.dot(x_high, y_low, tl.dot(x_low, y_high)))
    else:
        PRECISION: tl.constexpr = "ieee" if MODE == "bf16" or INTERPRETED else MODE
        return tl.dot(_operand(x, MODE), _operand(y, MODE), input_precision=PRECISION)


@triton.jit
def _in_parts(x, PARTS: tl.constexpr):
    """Reshape [rows, columns] to [PARTS, rows, columns / PARTS] if PARTS is above 1."""
    if PARTS == 1:
        return x
    else:
        return tl.permute(tl.reshape(x, (x.shape[0], PARTS, x.shape[1] // PARTS)), (1, 0, 2))


@triton.jit
def _inner(x, y, MODE: tl.constexpr, PARTS: tl.constexpr):
    """Return x y' for x and y `_in_parts`.

    Every warp multiplies its own part and the results are added. Otherwise each warp would hold all columns of an
    operand, and an fp32 operand as three of bf16 does not fit into registers by the hundred.
    """
    if PARTS == 1:
        return _dot(x, tl.trans(y), MODE)
    else:
        return tl.sum(_dot(x, tl.permute(y, (0, 2, 1)), MODE), axis=0)


@triton.jit
def _outer(x, y, MODE: tl.constexpr, PARTS: tl.constexpr):
    """Return x y, in parts like y; x is not in parts."""
    if PARTS == 1:
        return _dot(x, y, MODE)
    else:
        return _dot(tl.broadcast_to(x[None, :, :], (PARTS, x.shape[0], x.shape[1])), y, MODE)


@triton.jit
def _down(rows, PARTS: tl.constexpr):
    """Return row numbers, shaped to combine with `_along`."""
    return rows[:, None] if PARTS == 1 else rows[None, :, None]


@triton.jit
def _along(columns, PARTS: tl.constexpr):
    """Return per-column values, shaped to make a tile `_in_parts` with `_down`."""
    if PARTS == 1:
        return columns[None, :]
    else:
        return tl.reshape(columns, (PARTS, 1, columns.shape[0] // PARTS))


@triton.jit
def _store(pointers, value, mask=None):
    if INTERPRETED and pointers.dtype.element_ty == tl.bfloat16:
        value = _round_to_bf16(value.to(tl.float32))
    tl.store(pointers, value.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def _sums(w, L: tl.constexpr):
    """Sum rows of w from the middle of the chunk to each row, and over each half."""
    first_half = (tl.arange(0, L) < L // 2)[:, None]
    middle = tl.sum(tl.where(first_half, w, 0.0), axis=0)
    end = tl.sum(tl.where(first_half, 0.0, w), axis=0)
    return tl.cumsum(w, axis=0) - middle[None, :], middle, end


@triton.jit
def _exp2(coarse, fine):
    """Return 2^(coarse + fine) for a small `fine`, without rounding the sum."""
    whole = tl.floor(coarse)
    return tl.exp2(whole) * tl.exp2((coarse - whole) + fine)


@triton.jit
def _decays(w, L: tl.constexpr, MODE: tl.constexpr):
    """Compute the decays of a chunk from log decays [L, columns].

    Returns the decay from the middle of the chunk to the end of each token, its inverse, the one to the start of each
    token, and per column those from the start to the middle and from the middle to the end.

    Exponents are taken from the middle because that halves their range: log decays of -5 fit fp32 with L = 32. Rounded
    to fp32 they would still cost up to 1e-5. Where products have fp32 precision, multiples of 2^-12, whose sums are
    exact, and the rest are therefore summed apart.
    """
    w = w * LOG2_E
    if MODE == "bf16x6":
        coarse = tl.floor(w * 4096.0 + 0.5) * (1.0 / 4096.0)
        fine = w - coarse
        c, middle, end = _sums(coarse, L)
        c_fine, middle_fine, end_fine = _sums(fine, L)
        p = _exp2(c, c_fine)
        inverse = _exp2(-c, -c_fine)
        before = _exp2(c - coarse, c_fine - fine)
        return p, inverse, before, _exp2(middle, middle_fine), _exp2(end, end_fine)
    else:
        row = tl.arange(0, L)[:, None]
        column = tl.arange(0, L)[None, :]
        signs = tl.where(column <= row, 1.0, 0.0) - tl.where(column < L // 2, 1.0, 0.0)
        c = _signed_sums(signs, w)
        middle = tl.sum(tl.where(row == 0, w - c, 0.0), axis=0)
        end = tl.sum(tl.where(row == L - 1, c, 0.0), axis=0)
        return tl.exp2(c), tl.exp2(-c), tl.exp2(c - w), tl.exp2(middle), tl.exp2(end)


@triton.jit
def _inverse(A, L: tl.constexpr, MODE: tl.constexpr):
    """Return (I - A)^-1 for a strictly lower triangular A by block substitution.

    Blocks of 1, 2, 4, ... rows are merged, [[X, 0], [Y M X, Y]] being the inverse of two neighbors X and Y with M
    between them. Unlike in a product of powers of A nothing outgrows the inverse, so repeated keys are harmless.
    """
    i = tl.arange(0, L)[:, None]
    j = tl.arange(0, L)[None, :]
    X = tl.where(i == j, 1.0, tl.where(i // 2 == j // 2, A, 0.0))
    for level in tl.static_range(1, 5):
        if (1 << level) < L:
            between = (i // (2 << level) == j // (2 << level)) & (i // (1 << level) != j // (1 << level))
            X += _dot(_dot(X, tl.where(between, A, 0.0), MODE), X, MODE)
    return X


@triton.jit
def _chunk(index, chunks_, T, L: tl.constexpr):
    """Return (batch row, first token, end of the sequence) of a chunk."""
    if chunks_ is None:
        count = tl.cdiv(T, L)
        return index // count, (index % count) * L, T + index * 0
    else:
        return index * 0, tl.load(chunks_ + 2 * index), tl.load(chunks_ + 2 * index + 1)


@triton.jit
def _real(mask_, mask_b, batch, t, end):
    """Return which of the tokens t belong to the sequence and are not masked."""
    real = t < end
    if mask_ is not None:
        real = real & (tl.load(mask_ + batch * mask_b + t, mask=real, other=0) != 0)
    return real


@triton.jit(do_not_specialize=RUNTIME)
def prepare(
    r_, r_b, r_t, r_h,
    w_, w_b, w_t, w_h,
    k_, k_b, k_t, k_h, k_group,
    a_, a_b, a_t, a_h, a_group,
    b_, b_b, b_t, b_h, b_group,
    mask_, mask_b, chunks_,
    Q_, W_, Kp_, Bg_, Z_, C_, T_, X_, RX_,
    T, H,
    D: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, L: tl.constexpr,
    LOCAL: tl.constexpr, SQUARE: tl.constexpr, UNROLL: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Compute the tiles of a chunk, which need neither v nor the state.

    Grid: (chunks, heads). T_ is for the scan of a forward that will be differentiated, X_ and RX_ for the backward
    scan; each may be None.
    """
    chunk = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    batch, start, end = _chunk(chunk, chunks_, T, L)
    if start >= end:  # a surplus chunk of packed sequences
        return
    i = tl.arange(0, L)
    t = start + i
    real = _real(mask_, mask_b, batch, t, end)
    r_ += batch * r_b + head * r_h
    w_ += batch * w_b + head * w_h
    k_ += batch * k_b + (head // k_group) * k_h
    a_ += batch * a_b + (head // a_group) * a_h
    b_ += batch * b_b + (head // b_group) * b_h
    lower = i[:, None] > i[None, :]
    lower_or_equal = i[:, None] >= i[None, :]

    AB = tl.zeros((L, L), tl.float32)
    AK = tl.zeros((L, L), tl.float32)
    RB = tl.zeros((L, L), tl.float32)
    RK = tl.zeros((L, L), tl.float32)
    for block in range(0, K, UNROLL * BK):
        for k0 in tl.static_range(0, UNROLL * BK, BK):
            j = block + k0 + tl.arange(0, BK)
            m = real[:, None] & (j < D)[None, :]
            # all loads first: what follows is full of barriers, which no load is moved over
            w = tl.load(w_ + t[:, None] * w_t + j[None, :], mask=m, other=0.0).to(tl.float32)
            r = tl.load(r_ + t[:, None] * r_t + j[None, :], mask=m, other=0.0)
            a = tl.load(a_ + t[:, None] * a_t + j[None, :], mask=m, other=0.0)
            k = tl.load(k_ + t[:, None] * k_t + j[None, :], mask=m, other=0.0)
            b = tl.load(b_ + t[:, None] * b_t + j[None, :], mask=m, other=0.0)
            p, inverse, before, _, _ = _decays(w, L, LOCAL)
            Rt = r.to(tl.float32) * p
            At = a.to(tl.float32) * before
            Kt = k.to(tl.float32) * inverse
            Bt = b.to(tl.float32) * inverse
            Rp = _in_parts(Rt, PARTS)
            Ap = _in_parts(At, PARTS)
            Kp = _in_parts(Kt, PARTS)
            Bp = _in_parts(Bt, PARTS)
            AB += _inner(Ap, Bp, LOCAL, PARTS)
            AK += _inner(Ap, Kp, LOCAL, PARTS)
            RB += _inner(Rp, Bp, LOCAL, PARTS)
            RK += _inner(Rp, Kp, LOCAL, PARTS)
    X = _inverse(tl.where(lower, AB, 0.0), L, SQUARE)
    AK = tl.where(lower, AK, 0.0)
    RX = _dot(tl.where(lower_or_equal, RB, 0.0), X, SQUARE)
    Tm = _dot(X, AK, SQUARE)
    Z = tl.where(lower_or_equal, RK + _dot(RX, AK, SQUARE), 0.0)
    row = (chunk * H + head) * L + i
    square = row[:, None] * L + i[None, :]
    # A store here keeps the compiler from holding the tiles of all blocks until the second loop; one block fits.
    if BK < K:
        _store(Z_ + square, Z)
    Tt = tl.trans(Tm)
    for block in range(0, K, UNROLL * BK):
        for k0 in tl.static_range(0, UNROLL * BK, BK):
            j = block + k0 + tl.arange(0, BK)
            m = real[:, None] & (j < D)[None, :]
            w = tl.load(w_ + t[:, None] * w_t + j[None, :], mask=m, other=0.0).to(tl.float32)
            r = tl.load(r_ + t[:, None] * r_t + j[None, :], mask=m, other=0.0)
            a = tl.load(a_ + t[:, None] * a_t + j[None, :], mask=m, other=0.0)
            k = tl.load(k_ + t[:, None] * k_t + j[None, :], mask=m, other=0.0)
            b = tl.load(b_ + t[:, None] * b_t + j[None, :], mask=m, other=0.0)
            p, inverse, before, e, g = _decays(w, L, LOCAL)
            At = a.to(tl.float32) * before
            tile = row[:, None] * K + j[None, :]
            _store(W_ + tile, _dot(X, At, LOCAL) * e[None, :])
            Rt = r.to(tl.float32) * p
            _store(Q_ + tile, (Rt + _dot(RX, At, LOCAL)) * e[None, :])
            Bt = b.to(tl.float32) * inverse
            _store(Bg_ + tile, Bt * g[None, :])
            Kt = k.to(tl.float32) * inverse
            _store(Kp_ + tile, (Kt + _dot(Tt, Bt, LOCAL)) * g[None, :])
            tl.store(C_ + (chunk * H + head) * K + j, e * g)
    if BK == K:
        _store(Z_ + square, Z)
    if T_ is not None:
        _store(T_ + square, Tm)
    if X_ is not None:
        _store(X_ + square, X)
        _store(RX_ + square, RX)


@triton.jit
def _span(span, cu_, first_, T, SEGMENTS, L: tl.constexpr):
    """Locate what one program scans: a sequence, or one of its segments.

    Returns (batch row, first token, end of the sequence, first chunk, number of chunks).
    """
    if cu_ is None:
        total = tl.cdiv(T, L)
        per = tl.cdiv(total, SEGMENTS)
        batch = span // SEGMENTS
        first = tl.minimum((span % SEGMENTS) * per, total)
        count = tl.minimum(first + per, total) - first
        return batch, first * L, T + span * 0, batch * total + first, count.to(tl.int32)
    else:
        start = tl.load(cu_ + span).to(tl.int64)
        end = tl.load(cu_ + span + 1).to(tl.int64)
        return span * 0, start, end, tl.load(first_ + span), tl.cdiv(end - start, L).to(tl.int32)


@triton.jit
def _initial(initial_, row, column, identity, D: tl.constexpr):
    """Return the state a scan starts from: the pointer's, else zero or the identity."""
    inside = (row < D) & (column < D)
    if initial_ is not None:
        return tl.load(initial_ + row * D + column, mask=inside, other=0.0).to(tl.float32)
    else:
        return tl.where(inside & (row == column) & identity, 1.0, 0.0)


@triton.jit(do_not_specialize=RUNTIME)
def scan_forward(
    v_, v_b, v_t, v_h, v_group,
    mask_, mask_b, cu_, first_,
    Q_, W_, Kp_, Bg_, Z_, C_, T_,
    initial_, y_, starts_, U_, final_,
    T, H, SEGMENTS,
    D: tl.constexpr, K: tl.constexpr, BV: tl.constexpr, L: tl.constexpr,
    STATE: tl.constexpr, AFFINE: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Carry BV rows of the state over the chunks of a span.

    Grid: (spans * heads * blocks of rows). Rows do not interact, so splitting them needs no communication.

    With AFFINE, instead of outputs, the map S -> S M + N of the whole span is written: `final_` holds N and then M, and
    there are twice as many blocks of rows. Else y_ is written, and for a later backward the state before each chunk
    (starts_) and U_, unless they are None.
    """
    BLOCKS: tl.constexpr = K // BV
    MAPS: tl.constexpr = 2 if AFFINE else 1
    program = tl.program_id(0).to(tl.int64)
    block = program % BLOCKS
    identity = (program // BLOCKS) % MAPS == 1
    part = program // BLOCKS
    head = (part // MAPS) % H
    span = part // MAPS // H
    batch, start, end, chunk, count = _span(span, cu_, first_, T, SEGMENTS, L)
    i = tl.arange(0, L)
    j = tl.arange(0, K)
    rows = block * BV + tl.arange(0, BV)
    row = _down(rows, PARTS)
    column = _along(j, PARTS)
    # (the pointer of a state advances by span and head here, by row and column where it is used)
    if initial_ is not None:
        initial_ += part * D * D
    S = _initial(initial_, row, column, identity, D)
    v_ += batch * v_b + (head // v_group) * v_h
    for n in tl.range(0, count, num_stages=STAGES):  # (said here, it holds for loads that feed no product, too)
        t = start + n * L + i
        real = _real(mask_, mask_b, batch, t, end)
        base = (chunk + n) * H + head
        tile = _down(base * L + i, PARTS) * K + column
        square = (base * L + i)[:, None] * L + i[None, :]
        decay = tl.load(C_ + base * K + j)
        takes = (rows < D)[:, None] & real[None, :]
        if AFFINE:
            takes = takes & (identity == 0)
        v = tl.load(v_ + rows[:, None] + t[None, :] * v_t, mask=takes, other=0.0)  # [BV, L]
        state = _operand(S, STATE)
        removed = _inner(state, tl.load(W_ + tile), STATE, PARTS)
        if not AFFINE:
            y = _inner(state, tl.load(Q_ + tile), STATE, PARTS) + _dot(v, tl.trans(tl.load(Z_ + square)), STATE)
            inside = (rows < D)[:, None] & (t < end)[None, :]
            out = ((batch * T + t) * H + head)[None, :] * D + rows[:, None]
            _store(y_ + out, tl.where(real[None, :], y, 0.0), mask=inside)
        if starts_ is not None:
            _store(starts_ + base * K * K + row * K + column, S)
            U = removed + _dot(v, tl.trans(tl.load(T_ + square)), STATE)
            _store(U_ + (base * L + i)[None, :] * K + rows[:, None], U)
        S = S * _along(decay, PARTS)
        S += _outer(removed, tl.load(Bg_ + tile), STATE, PARTS) + _outer(v, tl.load(Kp_ + tile), STATE, PARTS)
    inside = (row < D) & (column < D)
    if not AFFINE:
        inside = inside & (span % SEGMENTS == SEGMENTS - 1)
        part = span // SEGMENTS * H + head
    tl.store(final_ + part * D * D + row * D + column, S, mask=inside)


@triton.jit(do_not_specialize=RUNTIME)
def scan_backward(
    dy_, dy_b, dy_t, dy_h,
    mask_, mask_b, cu_, first_,
    Q_, W_, Kp_, Bg_, Z_, C_, X_, RX_,
    dfinal_, ends_, P_, dv_, dinitial_,
    T, H, SEGMENTS,
    D: tl.constexpr, K: tl.constexpr, BV: tl.constexpr, L: tl.constexpr,
    STATE: tl.constexpr, AFFINE: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Carry BV rows of the gradient of the state back over the chunks of a span.

    Grid and AFFINE are as in `scan_forward`. Writes that gradient after each chunk (ends_), P_, and dv_ (batch, token,
    head, column), contiguous.
    """
    BLOCKS: tl.constexpr = K // BV
    MAPS: tl.constexpr = 2 if AFFINE else 1
    program = tl.program_id(0).to(tl.int64)
    block = program % BLOCKS
    identity = (program // BLOCKS) % MAPS == 1
    part = program // BLOCKS
    head = (part // MAPS) % H
    span = part // MAPS // H
    batch, start, end, chunk, count = _span(span, cu_, first_, T, SEGMENTS, L)
    i = tl.arange(0, L)
    j = tl.arange(0, K)
    rows = block * BV + tl.arange(0, BV)
    row = _down(rows, PARTS)
    column = _along(j, PARTS)
    if dfinal_ is not None:
        dfinal_ += part * D * D
    dS = _initial(dfinal_, row, column, identity, D)
    dy_ += batch * dy_b + head * dy_h
    for step in tl.range(0, count, num_stages=STAGES):
        n = count - 1 - step
        t = start + n * L + i
        real = _real(mask_, mask_b, batch, t, end)
        base = (chunk + n) * H + head
        tile = _down(base * L + i, PARTS) * K + column
        square = (base * L + i)[:, None] * L + i[None, :]
        decay = tl.load(C_ + base * K + j)
        takes = (rows < D)[:, None] & real[None, :]
        if AFFINE:
            takes = takes & (identity == 0)
        dy = tl.load(dy_ + rows[:, None] + t[None, :] * dy_t, mask=takes, other=0.0)  # [BV, L]
        state = _operand(dS, STATE)
        E = _inner(state, tl.load(Bg_ + tile), STATE, PARTS)
        if not AFFINE:
            _store(ends_ + base * K * K + row * K + column, dS)
            P = _dot(E, tl.load(X_ + square), STATE) + _dot(dy, tl.load(RX_ + square), STATE)
            _store(P_ + (base * L + i)[None, :] * K + rows[:, None], P)
            dv = _inner(state, tl.load(Kp_ + tile), STATE, PARTS) + _dot(dy, tl.load(Z_ + square), STATE)
            inside = (rows < D)[:, None] & (t < end)[None, :]
            out = ((batch * T + t) * H + head)[None, :] * D + rows[:, None]
            _store(dv_ + out, tl.where(real[None, :], dv, 0.0), mask=inside)
        dS = dS * _along(decay, PARTS)
        dS += _outer(E, tl.load(W_ + tile), STATE, PARTS) + _outer(dy, tl.load(Q_ + tile), STATE, PARTS)
    inside = (row < D) & (column < D)
    if not AFFINE:
        inside = inside & (span % SEGMENTS == 0)
        part = span // SEGMENTS * H + head
    tl.store(dinitial_ + part * D * D + row * D + column, dS, mask=inside)


@triton.jit(do_not_specialize=RUNTIME)
def gradient(
    r_, r_b, r_t, r_h,
    w_, w_b, w_t, w_h,
    k_, k_b, k_t, k_h, k_group,
    v_, v_b, v_t, v_h, v_group,
    a_, a_b, a_t, a_h, a_group,
    b_, b_b, b_t, b_h, b_group,
    dy_, dy_b, dy_t, dy_h,
    mask_, mask_b, chunks_,
    starts_, U_, ends_, P_,
    dr_, dw_, dk_, da_, db_,
    T, H,
    D: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, UNROLL: tl.constexpr, L: tl.constexpr,
    STATE: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of BK columns of r, w, k, a, b in one chunk.

    Grid: (chunks * blocks of columns, heads). Outputs are (batch, token, head, column), contiguous.

    The gradient of a decay is a difference of sums over pairs of tokens that cancel almost wholly where decays are
    strong. The sums within the chunk are therefore taken over the very operands that the products have read, rounded
    as they were: pairs then cancel exactly, and the error stays as small as that of the other gradients.
    """
    BLOCKS: tl.constexpr = K // BK
    program = tl.program_id(0).to(tl.int64)
    chunk = program // BLOCKS
    head = tl.program_id(1).to(tl.int64)
    batch, start, end = _chunk(chunk, chunks_, T, L)
    if start >= end:  # a surplus chunk of packed sequences
        return
    i = tl.arange(0, L)
    j = (program % BLOCKS) * BK + tl.arange(0, BK)
    t = start + i
    real = _real(mask_, mask_b, batch, t, end)
    base = chunk * H + head
    v_ += batch * v_b + (head // v_group) * v_h
    dy_ += batch * dy_b + head * dy_h

    # What the second half reads is loaded first: the first is full of barriers, which no load is moved over.
    m = real[:, None] & (j < D)[None, :]
    k_ += batch * k_b + (head // k_group) * k_h
    b_ += batch * b_b + (head // b_group) * b_h
    a_ += batch * a_b + (head // a_group) * a_h
    w = tl.load(w_ + batch * w_b + head * w_h + t[:, None] * w_t + j[None, :], mask=m, other=0.0).to(tl.float32)
    r = tl.load(r_ + batch * r_b + head * r_h + t[:, None] * r_t + j[None, :], mask=m, other=0.0)
    k = tl.load(k_ + t[:, None] * k_t + j[None, :], mask=m, other=0.0)
    a = tl.load(a_ + t[:, None] * a_t + j[None, :], mask=m, other=0.0)
    b = tl.load(b_ + t[:, None] * b_t + j[None, :], mask=m, other=0.0)

    dRK = tl.zeros((L, L), tl.float32)
    dRB = tl.zeros((L, L), tl.float32)
    dAK = tl.zeros((L, L), tl.float32)
    dAB = tl.zeros((L, L), tl.float32)
    dR = tl.zeros((L, BK), tl.float32)  # the parts of the gradients that come through the state
    dA = tl.zeros((L, BK), tl.float32)
    dK = tl.zeros((L, BK), tl.float32)
    dB = tl.zeros((L, BK), tl.float32)
    carried = tl.zeros((BK,), tl.float32)
    for span in range(0, K, UNROLL * BV):
        for v0 in tl.static_range(0, UNROLL * BV, BV):
            rows = span + v0 + tl.arange(0, BV)
            takes = real[:, None] & (rows < D)[None, :]
            tile = (base * L + i)[:, None] * K + rows[None, :]
            square = base * K * K + rows[:, None] * K + j[None, :]
            dy = tl.load(dy_ + t[:, None] * dy_t + rows[None, :], mask=takes, other=0.0)
            P = tl.load(P_ + tile)
            v = tl.load(v_ + t[:, None] * v_t + rows[None, :], mask=takes, other=0.0)
            U = tl.load(U_ + tile)
            S = tl.load(starts_ + square)
            dS = tl.load(ends_ + square)
            vt = tl.trans(v)
            Ut = tl.trans(U)
            dRK += _dot(dy, vt, FINAL)
            dRB += _dot(dy, Ut, FINAL)
            dAK += _dot(P, vt, FINAL)
            dAB += _dot(P, Ut, FINAL)
            dR += _dot(dy, S, STATE)
            dA += _dot(P, S, STATE)
            dK += _dot(v, dS, STATE)
            dB += _dot(U, dS, STATE)
            carried += tl.sum(S.to(tl.float32) * dS.to(tl.float32), axis=0)
    lower = i[:, None] > i[None, :]
    lower_or_equal = i[:, None] >= i[None, :]
    dRK = _operand(tl.where(lower_or_equal, dRK, 0.0), FINAL)
    dRB = _operand(tl.where(lower_or_equal, dRB, 0.0), FINAL)
    dAK = _operand(tl.where(lower, dAK, 0.0), FINAL)
    dAB = _operand(tl.where(lower, dAB, 0.0), FINAL)

    inside = (t < end)[:, None] & (j < D)[None, :]
    out = ((batch * T + t) * H + head)[:, None] * D + j[None, :]
    p, inverse, before, e, g = _decays(w, L, FINAL)
    Kt = k.to(tl.float32) * inverse
    Bt = b.to(tl.float32) * inverse
    Ko = _operand(Kt, FINAL)
    Bo = _operand(Bt, FINAL)
    Rt = r.to(tl.float32) * p
    Ro = _operand(Rt, FINAL)
    dR *= e[None, :]
    within = _dot(dRK, Ko, FINAL) + _dot(dRB, Bo, FINAL)
    crossing = within * Ro.to(tl.float32) + dR * Rt
    _store(dr_ + out, (within + dR) * p, mask=inside)
    At = a.to(tl.float32) * before
    Ao = _operand(At, FINAL)
    dA *= e[None, :]
    within = _dot(dAK, Ko, FINAL) + _dot(dAB, Bo, FINAL)
    own = within * Ao.to(tl.float32) + dA * At
    crossing += own
    _store(da_ + out, (within + dA) * before, mask=inside)
    dK *= g[None, :]
    within = _dot(tl.trans(dRK), Ro, FINAL) + _dot(tl.trans(dAK), Ao, FINAL)
    crossing -= within * Ko.to(tl.float32)
    leaving = dK * Kt
    _store(dk_ + out, (within + dK) * inverse, mask=inside)
    dB *= g[None, :]
    within = _dot(tl.trans(dRB), Ro, FINAL) + _dot(tl.trans(dAB), Ao, FINAL)
    crossing -= within * Bo.to(tl.float32)
    leaving += dB * Bt
    _store(db_ + out, (within + dB) * inverse, mask=inside)
    # A token's decay scales what enters the chunk and leaves it, what leaves it from an earlier token, and what is
    # read from its own token on (by `a` from the next one on) but was not written from its own token on.
    if FINAL == "bf16x6":
        dw = tl.cumsum(leaving, axis=0) - leaving + tl.cumsum(crossing, axis=0, reverse=True)
    else:
        dw = _signed_sums(tl.where(lower, 1.0, 0.0), leaving)
        dw += _signed_sums(tl.where(i[:, None] <= i[None, :], 1.0, 0.0), crossing)
    dw += carried[None, :] * (e * g)[None, :] - own
    _store(dw_ + out, tl.where(m, dw, 0.0), mask=inside)


@triton.jit(do_not_specialize=RUNTIME)
def sum_heads(grads_, sums_, groups, R: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Sum gradients (groups, R, D) of R heads that share an input, in fp32; `sums_` is (groups, D), both contiguous.

    Grid: blocks of BLOCK // D groups, side by side, so that hardly a thread is idle where D is no power of two. D is a
    multiple of 8: the 16 bytes that a thread loads or stores at a time are of one head.
    """
    GROUPS: tl.constexpr = BLOCK // D
    first = tl.program_id(0).to(tl.int64) * GROUPS
    i = tl.arange(0, BLOCK)
    group = i // D
    inside = (group < GROUPS) & (group < groups - first)
    grads_ += first * (R * D) + group * (R * D) + i % D
    total = tl.zeros((BLOCK,), tl.float32)
    for head in tl.static_range(R):
        total += tl.load(grads_ + head * D, mask=inside, other=0.0).to(tl.float32)
    _store(sums_ + first * D + i, total, mask=inside)


@triton.jit
def advance(before_, before_b, affine_, affine_b, after_, after_b, H, D: tl.constexpr, BLOCK: tl.constexpr):
    """Compute after = before M + N in fp32.

    `affine_` (batch, head, 2, D, D) holds N and M. Grid: (batch * heads, blocks of rows, blocks of columns). The states
    of one batch row are contiguous.
    """
    program = tl.program_id(0).to(tl.int64)
    batch = program // H
    head = program % H
    rows = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[:, None]
    columns = (tl.program_id(2) * BLOCK + tl.arange(0, BLOCK))[None, :]
    before_ += batch * before_b + head * D * D
    affine_ += batch * affine_b + head * 2 * D * D
    after_ += batch * after_b + head * D * D
    inside = (rows < D) & (columns < D)
    result = tl.load(affine_ + rows * D + columns, mask=inside, other=0.0)
    for k0 in range(0, D, BLOCK):
        along = k0 + tl.arange(0, BLOCK)[None, :]
        down = k0 + tl.arange(0, BLOCK)[:, None]
        S = tl.load(before_ + rows * D + along, mask=(rows < D) & (along < D), other=0.0)
        M = tl.load(affine_ + D * D + down * D + columns, mask=(down < D) & (columns < D), other=0.0)
        result += _dot(S, M, "bf16x6")
    tl.store(after_ + rows * D + columns, result, mask=inside)
