"""The Triton kernels of the work around the WKV-7 recurrence: from projections to its inputs, from its output on.

They only compute; `mixer.py` decides on buffers and launches, docs/mixer.md has the equations. Everything is pointwise
or a sum over one head, so bytes are what counts: a program owns BLOCKS blocks of BLOCK tokens, and one head of keys and
values with the heads that share it. It reads each projection once, computes in fp32, and the backward computes again
what the forward did not write. What heads share is summed inside a program. Gradients of parameters add up in tiles
from block to block, whose tokens are summed once, at a program's end, to be added to those of other programs
afterwards: no atomics.

Loads wait for memory, and none moves ahead of a store, which might write what it reads. So a block begins with its
loads, and each head loads what the next one needs before it computes. The rows of a tile lie within warps where
`mixer.py` can have it so: no warp waits for another one inside of the loop over blocks.

Token tensors are (token, head, column). Projections have contiguous columns and strides `_t` and `_h`, all others are
contiguous, so that they share their places within a tile. A tile is [tokens, columns
of one head]. `D` is the head size and `P` half of it, padded to a power of two: each half of a head is padded by
itself, because the rotation pairs them. Parameters are (head, column), contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rwkvinside.kernels.gpu.kernels import _store

DECAY_SCALE = tl.constexpr(0.6065306597126334)  # exp(-0.5), see rwkvinside.modeling.time_mixer
ADDITIVE_SCALE = tl.constexpr(0.2)
SHORTEST = tl.constexpr(1e-12)  # a shorter key is not scaled to length one, as in torch.nn.functional.normalize
# Plain numbers that change from call to call: no specialized variant of a kernel for each
RUNTIME = ["TOKENS", "POSITIONS"]


@triton.jit
def _place(G, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, D: tl.constexpr, P: tl.constexpr):
    """Locate a program: which of all it is along the tokens, its first token, and its head of keys and values.

    Also returns the rows [BLOCK, 1] and columns [BLOCK, 2 P] of a tile, and which of its columns exist.
    """
    program = tl.program_id(0)
    span = (program // G).to(tl.int64)
    column, exists = _columns(D, P)
    # of parameters too, every token reads its own copy: a row shared by all would get another layout than the tiles
    column = tl.broadcast_to(column[None, :], (BLOCK, 2 * P))
    return span, span * (BLOCK * BLOCKS), program % G, tl.arange(0, BLOCK)[:, None], column, exists[None, :]


@triton.jit
def _columns(D: tl.constexpr, P: tl.constexpr):
    """Return the columns of a padded head, and which of them exist."""
    i = tl.arange(0, 2 * P)
    return i // P * (D // 2) + i % P, i % P < D // 2


@triton.jit
def _load(pointers, inside):
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _tile(x_, x_t, x_h, start, head, row, column, inside):
    """Load one head of the tokens from `start` on; 0 if there is no tensor."""
    if x_ is not None:
        return _load(x_ + start * x_t + head.to(tl.int64) * x_h + (row * x_t + column), inside)
    else:
        return 0.0


@triton.jit
def _own(x_, heads, start, head, row, column, inside, D: tl.constexpr):
    """Load one head of the tokens from `start` on of a contiguous tensor of so many heads; 0 if there is none."""
    if x_ is not None:
        return _load(x_ + (start * heads + head) * D + (row * (heads * D) + column), inside)
    else:
        return 0.0


@triton.jit
def _scalar(x_, heads, start, head, row, there):
    """Load one number of a head for each of the tokens from `start` on; 0 if there is no tensor."""
    if x_ is not None:
        return _load(x_ + start * heads + head + row * heads, there)
    else:
        return 0.0


@triton.jit
def _store_tile(x_, heads, start, head, row, column, inside, value, D: tl.constexpr):
    """Store one head of the tokens from `start` on, in a contiguous tensor of so many heads; nothing if it is None."""
    if x_ is not None:
        _store(x_ + (start * heads + head) * D + (row * (heads * D) + column), value, inside)


@triton.jit
def _rotation(cos_, cos_t, sin_, sin_t, start, row, column, inside, POSITIONS):
    """Load cos and sin of the tokens from `start` on; 0 if nothing is rotated."""
    if cos_ is not None:
        position = ((start.to(tl.int32) + row) % POSITIONS).to(tl.int64)
        return _load(cos_ + position * cos_t + column, inside), _load(sin_ + position * sin_t + column, inside)
    else:
        return 0.0, 0.0


@triton.jit
def _sum_head(x):
    """Sum a tile over its columns, to [BLOCK, 1]."""
    return tl.sum(x, axis=1, keep_dims=True)


@triton.jit
def _store_sum(row_, x, D: tl.constexpr, P: tl.constexpr):
    """Store the sum of a tile over its tokens in a row of D columns; nothing if there is no row."""
    if row_ is not None:
        column, exists = _columns(D, P)
        tl.store(row_ + column, tl.sum(x, axis=0), mask=exists)


@triton.jit
def _turned(x):
    """Return (-second half, first half) of every head.

    Sums of one value and zeros stay within a warp, which permuting the tile would not.
    """
    BLOCK: tl.constexpr = x.shape[0]
    P: tl.constexpr = x.shape[1] // 2
    x = tl.reshape(x, (BLOCK, 2, P))
    in_first = tl.arange(0, 2)[None, :, None] == 0
    first = tl.sum(tl.where(in_first, x, 0.0), axis=1, keep_dims=True)
    second = tl.sum(tl.where(in_first, 0.0, x), axis=1, keep_dims=True)
    return tl.reshape(tl.where(in_first, -second, first), (BLOCK, 2 * P))


@triton.jit
def _normed(x, norm_, eps, D: tl.constexpr):
    """Return a tile scaled to a mean square of one, and the scale; as it is if there is no norm."""
    if norm_ is not None:
        scale = tl.rsqrt(_sum_head(x * x) * (1.0 / D) + eps)
        return x * scale, scale
    else:
        return x, 1.0


@triton.jit
def _rotated(normed, norm_, cos_, cos, sin, column, exists):
    """Weight a normed tile and rotate it, where there are weights and a rotation."""
    if norm_ is not None:
        normed = normed * _load(norm_ + column, exists)
    if cos_ is not None:
        return normed * cos + _turned(normed) * sin
    else:
        return normed


@triton.jit
def _from_rotated(d, normed, scale, norm_, cos_, cos, sin, column, exists, D: tl.constexpr):
    """Return the gradient of a tile before norm and rotation, and the tile whose sum is that of the norm's weight."""
    if cos_ is not None:
        d = d * cos - _turned(d * sin)
    if norm_ is not None:
        dweight = d * normed
        d = d * _load(norm_ + column, exists)
        return scale * (d - normed * (_sum_head(d * normed) * (1.0 / D))), dweight
    else:
        return d, d


@triton.jit
def _key(k, key_gate, k_first, k_norm_, k0_, cos_, cos, sin, g, column, exists, eps, D: tl.constexpr):
    """Compute the key of a group.

    Returns the normed projection, its scale, the key before its residual mix, after it, and the first layer's share.
    """
    normed, scale = _normed(k, k_norm_, eps, D)
    own = _rotated(normed, k_norm_, cos_, cos, sin, column, exists)
    if k0_ is not None:
        share = tl.sigmoid(key_gate + _load(k0_ + g * D + column, exists))
        return normed, scale, own, own + (k_first - own) * share, share
    else:
        return normed, scale, own, own, own


@triton.jit
def _unit(x):
    """Return the rows of a tile scaled to length one, what they were multiplied by, and which were scaled so."""
    square = _sum_head(x * x)
    scale = tl.rsqrt(tl.maximum(square, SHORTEST * SHORTEST))
    return x * scale, scale, square > SHORTEST * SHORTEST


@triton.jit
def _from_unit(d, unit, scale, scaled):
    """Return the gradient of what `_unit` was given."""
    return scale * (d - unit * tl.where(scaled, _sum_head(d * unit), 0.0))


@triton.jit
def _decay(z, KEY_SCALE: tl.constexpr):
    """Return sigmoid(z), the log decay, and the s of the key's scale."""
    gate = tl.sigmoid(z)
    w = gate * -DECAY_SCALE
    if KEY_SCALE == "decay":
        return gate, w, tl.exp(w)
    else:
        return gate, w, tl.minimum(z, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(z))) - 0.5


@triton.jit
def _head_inputs(r_, r_t, r_h, decay_, iclr_, start, heads, head, row, column, inside, D: tl.constexpr):
    """Load what one head of `inputs_forward` reads for itself."""
    return (
        _tile(r_, r_t, r_h, start, head, row, column, inside),
        _own(decay_, heads, start, head, row, column, inside, D),
        _own(iclr_, heads, start, head, row, column, inside, D),
    )


@triton.jit
def _value_inputs(
    gate_, v_first_, v_first_t, v_first_h, start, heads, head, row, column, inside,
    FIRST: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Load what one head of values reads for itself."""
    return (
        _own(gate_, heads, start, head, row, column, inside, D),
        _tile(v_first_, v_first_t, v_first_h, start, head // FIRST, row, column, inside),
    )


@triton.jit(do_not_specialize=RUNTIME)
def inputs_forward(
    r_, r_t, r_h, k_, k_t, k_h, v_, v_t, v_h, decay_, iclr_,
    key_gate_, k_first_, k_first_t, k_first_h,
    value_gate_, v_first_, v_first_t, v_first_h,
    cos_, cos_t, sin_, sin_t, r_norm_, k_norm_, w0_, a0_, k0_, v0_, r_k_, k_k_, k_a_,
    r_out_, w_out_, k_out_, v_out_, a_out_, b_out_, bonus_, key_,
    eps, G, TOKENS, POSITIONS,
    R: tl.constexpr, RV: tl.constexpr, FIRST: tl.constexpr, KEY_SCALE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Compute the inputs of the recurrence for a program's tokens and the R heads of a group.

    Grid: (cdiv(TOKENS, BLOCK * BLOCKS) * G,). v has RV heads a group. FIRST of them read one head of v_first. Absent
    tensors are None: no residual mix, no rotation, no norm, no bonus. `key_` takes the key before its residual mix,
    which later layers read.
    """
    span, begin, g, row, column, exists = _place(G, BLOCK, BLOCKS, D, P)
    for step in range(BLOCKS):
        start = begin + step * BLOCK
        there = start + row < TOKENS
        inside = exists & there
        k = _tile(k_, k_t, k_h, start, g, row, column, inside)
        key_gate = _own(key_gate_, G, start, g, row, column, inside, D)
        k_first = _tile(k_first_, k_first_t, k_first_h, start, g, row, column, inside)
        cos, sin = _rotation(cos_, cos_t, sin_, sin_t, start, row, column, inside, POSITIONS)
        next_head = _head_inputs(r_, r_t, r_h, decay_, iclr_, start, G * R, g * R, row, column, inside, D)
        if v_out_ is not None:
            v = _tile(v_, v_t, v_h, start, g, row, column, inside)
            next_value = _value_inputs(
                value_gate_, v_first_, v_first_t, v_first_h, start, G * RV, g * RV, row, column,
                inside, FIRST, D,
            )  # fmt: skip

        _, _, own_key, k, _ = _key(k, key_gate, k_first, k_norm_, k0_, cos_, cos, sin, g, column, exists, eps, D)
        if KEY_SCALE != "k_a":
            unit, scale, scaled = _unit(k)

        for i in tl.static_range(R):
            head = g * R + i
            at_head = head * D + column
            r, decay, iclr = next_head
            if i + 1 < R:
                next_head = _head_inputs(r_, r_t, r_h, decay_, iclr_, start, G * R, head + 1, row, column, inside, D)
            normed, scale = _normed(r, r_norm_, eps, D)
            r = _rotated(normed, r_norm_, cos_, cos, sin, column, exists)
            gate, w, s = _decay(decay + _load(w0_ + at_head, exists), KEY_SCALE)
            rate = tl.sigmoid(iclr + _load(a0_ + at_head, exists))
            if KEY_SCALE == "k_a":
                unit, scale, scaled = _unit(k * _load(k_k_ + at_head, exists))
                scaled_key = k * (1.0 + (rate - 1.0) * _load(k_a_ + at_head, exists))
                _store_tile(a_out_, G * R, start, head, row, column, inside, -unit, D)
            else:
                scaled_key = k * (1.0 - s + rate)
            if bonus_ is not None:
                bonus = _sum_head(r * scaled_key * _load(r_k_ + at_head, exists))
                tl.store(bonus_ + (start + row) * (G * R) + head, bonus, mask=there)
            _store_tile(r_out_, G * R, start, head, row, column, inside, r, D)
            _store_tile(w_out_, G * R, start, head, row, column, inside, w, D)
            _store_tile(b_out_, G * R, start, head, row, column, inside, rate * unit, D)
            _store_tile(k_out_, G * R, start, head, row, column, inside, scaled_key, D)

        _store_tile(key_, G, start, g, row, column, inside, own_key, D)
        if KEY_SCALE != "k_a":
            _store_tile(a_out_, G, start, g, row, column, inside, -unit, D)
        if v_out_ is not None:
            for i in tl.static_range(RV):
                head = g * RV + i
                mix, first = next_value
                if i + 1 < RV:
                    next_value = _value_inputs(
                        value_gate_, v_first_, v_first_t, v_first_h, start, G * RV, head + 1, row, column,
                        inside, FIRST, D,
                    )  # fmt: skip
                if v_first_ is not None:
                    share = tl.sigmoid(mix + _load(v0_ + head * D + column, exists))
                    mixed = v + (first - v) * share
                else:
                    mixed = v + mix * ADDITIVE_SCALE
                _store_tile(v_out_, G * RV, start, head, row, column, inside, mixed, D)


@triton.jit
def _head_gradients(
    r_, r_t, r_h, decay_, iclr_, dr_out_, dw_out_, dk_out_, da_out_, db_out_, dbonus_,
    start, heads, head, row, column, inside, there, KEY_SCALE: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Load what one head of `inputs_backward` reads for itself."""
    own_da_ = da_out_ if KEY_SCALE == "k_a" else None
    return (
        _own(decay_, heads, start, head, row, column, inside, D),
        _own(iclr_, heads, start, head, row, column, inside, D),
        _tile(r_, r_t, r_h, start, head, row, column, inside),
        _own(dr_out_, heads, start, head, row, column, inside, D),
        _own(dk_out_, heads, start, head, row, column, inside, D),
        _own(db_out_, heads, start, head, row, column, inside, D),
        _own(dw_out_, heads, start, head, row, column, inside, D),
        _own(own_da_, heads, start, head, row, column, inside, D),
        _scalar(dbonus_, heads, start, head, row, there),
    )


@triton.jit
def _value_gradients(
    gate_, v_first_, v_first_t, v_first_h, dv_out_, start, heads, head, row, column, inside,
    FIRST: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Load what one head of values of `inputs_backward` reads for itself; the gate only if a sigmoid is taken of it."""
    own_gate_ = gate_ if v_first_ is not None else None
    return (
        _own(own_gate_, heads, start, head, row, column, inside, D),
        _tile(v_first_, v_first_t, v_first_h, start, head // FIRST, row, column, inside),
        _own(dv_out_, heads, start, head, row, column, inside, D),
    )


@triton.jit(do_not_specialize=RUNTIME)
def inputs_backward(
    r_, r_t, r_h, k_, k_t, k_h, v_, v_t, v_h, decay_, iclr_,
    key_gate_, k_first_, k_first_t, k_first_h,
    value_gate_, v_first_, v_first_t, v_first_h,
    cos_, cos_t, sin_, sin_t, r_norm_, k_norm_, w0_, a0_, k0_, v0_, r_k_, k_k_, k_a_,
    dr_out_, dw_out_, dk_out_,
    dv_out_, da_out_, db_out_,
    dbonus_, dkey_,
    dr_, dk_, dv_, ddecay_, diclr_, dkey_gate_, dk_first_, dvalue_gate_, dv_first_,
    dr_norm_, dk_norm_, dw0_, da0_, dk0_, dv0_, dr_k_, dk_k_, dk_a_, sums_t,
    eps, G, TOKENS, POSITIONS,
    R: tl.constexpr, RV: tl.constexpr, FIRST: tl.constexpr, KEY_SCALE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of everything that `inputs_forward` reads.

    Gradients of parameters are sums over the program's tokens, `sums_t` apart from program to program. dk_first_ and
    dv_first_ are None where nobody asks for them; dv_first_ has the heads of v_first.
    """
    span, begin, g, row, column, exists = _place(G, BLOCK, BLOCKS, D, P)
    nothing = tl.zeros((BLOCK, 2 * P), tl.float32)
    sum_r_norm = nothing
    sum_k_norm = nothing
    sum_k0 = nothing
    sum_v0 = (nothing,) * RV
    sum_w0 = (nothing,) * R
    sum_a0 = (nothing,) * R
    sum_r_k = (nothing,) * R
    sum_k_k = (nothing,) * R
    sum_k_a = (nothing,) * R

    for step in range(BLOCKS):
        start = begin + step * BLOCK
        there = start + row < TOKENS
        inside = exists & there
        k = _tile(k_, k_t, k_h, start, g, row, column, inside)
        key_gate = _own(key_gate_, G, start, g, row, column, inside, D)
        k_first = _tile(k_first_, k_first_t, k_first_h, start, g, row, column, inside)
        cos, sin = _rotation(cos_, cos_t, sin_, sin_t, start, row, column, inside, POSITIONS)
        next_head = _head_gradients(
            r_, r_t, r_h, decay_, iclr_, dr_out_, dw_out_, dk_out_, da_out_, db_out_, dbonus_,
            start, G * R, g * R, row, column, inside, there, KEY_SCALE, D,
        )  # fmt: skip
        if KEY_SCALE != "k_a":
            dunit = -_own(da_out_, G, start, g, row, column, inside, D)
        dkey = _own(dkey_, G, start, g, row, column, inside, D)
        if dv_out_ is not None:
            v = _tile(v_, v_t, v_h, start, g, row, column, inside)
            next_value = _value_gradients(
                value_gate_, v_first_, v_first_t, v_first_h, dv_out_, start, G * RV, g * RV, row, column,
                inside, FIRST, D,
            )  # fmt: skip

        if dv_out_ is not None:
            dv = tl.zeros_like(v)
            dfirst = tl.zeros_like(v)
            v0 = ()
            for i in tl.static_range(RV):
                head = g * RV + i
                mix, first, d = next_value
                if i + 1 < RV:
                    next_value = _value_gradients(
                        value_gate_, v_first_, v_first_t, v_first_h, dv_out_, start, G * RV, head + 1, row, column,
                        inside, FIRST, D,
                    )  # fmt: skip
                if v_first_ is not None:
                    mixed = tl.sigmoid(mix + _load(v0_ + head * D + column, exists))
                    dgate = d * (first - v) * mixed * (1.0 - mixed)
                    v0 = v0 + (sum_v0[i] + dgate,)
                    dv += d * (1.0 - mixed)
                    if FIRST == 1:
                        _store_tile(dv_first_, G * RV, start, head, row, column, inside, d * mixed, D)
                    else:
                        dfirst += d * mixed
                else:
                    v0 = v0 + (sum_v0[i],)
                    dgate = d * ADDITIVE_SCALE
                    dv += d
                _store_tile(dvalue_gate_, G * RV, start, head, row, column, inside, dgate, D)
            sum_v0 = v0
            _store_tile(dv_, G, start, g, row, column, inside, dv, D)
            if FIRST != 1:
                _store_tile(dv_first_, G, start, g, row, column, inside, dfirst, D)

        normed, scale, own, k, share = _key(
            k, key_gate, k_first, k_norm_, k0_, cos_, cos, sin, g, column, exists, eps, D,
        )  # fmt: skip
        dk = tl.zeros_like(k)
        if KEY_SCALE != "k_a":
            unit, unit_scale, scaled = _unit(k)

        w0 = ()
        a0 = ()
        r_k = ()
        k_k = ()
        k_a = ()
        for i in tl.static_range(R):
            head = g * R + i
            at_head = head * D + column
            decay, iclr, r, dr, dscaled, db, dw, da, dbonus = next_head
            if i + 1 < R:
                next_head = _head_gradients(
                    r_, r_t, r_h, decay_, iclr_, dr_out_, dw_out_, dk_out_, da_out_, db_out_, dbonus_,
                    start, G * R, head + 1, row, column, inside, there, KEY_SCALE, D,
                )  # fmt: skip
            gate, w, s = _decay(decay + _load(w0_ + at_head, exists), KEY_SCALE)
            rate = tl.sigmoid(iclr + _load(a0_ + at_head, exists))
            if KEY_SCALE == "k_a":
                key_weight = _load(k_k_ + at_head, exists)
                rate_weight = _load(k_a_ + at_head, exists)
                unit, unit_scale, scaled = _unit(k * key_weight)
                dunit = -da
                factor = 1.0 + (rate - 1.0) * rate_weight
            else:
                factor = 1.0 - s + rate

            normed_r, scale_r = _normed(r, r_norm_, eps, D)
            if dbonus_ is not None:
                r = _rotated(normed_r, r_norm_, cos_, cos, sin, column, exists)
                bonus_weight = _load(r_k_ + at_head, exists)
                weighted = dbonus * (k * factor)
                r_k = r_k + (sum_r_k[i] + weighted * r,)
                dr += weighted * bonus_weight
                dscaled += dbonus * r * bonus_weight
            else:
                r_k = r_k + (sum_r_k[i],)
            dr, dweight = _from_rotated(dr, normed_r, scale_r, r_norm_, cos_, cos, sin, column, exists, D)
            sum_r_norm += dweight

            dfactor = dscaled * k
            dk += dscaled * factor
            dunit += db * rate
            dz = dw * -DECAY_SCALE
            if KEY_SCALE == "k_a":
                dq = _from_unit(dunit, unit, unit_scale, scaled)
                k_k = k_k + (sum_k_k[i] + dq * k,)
                k_a = k_a + (sum_k_a[i] + dfactor * (rate - 1.0),)
                dk += dq * key_weight
                drate = dfactor * rate_weight + db * unit
                dz = dz * gate * (1.0 - gate)
            else:
                k_k = k_k + (sum_k_k[i],)
                k_a = k_a + (sum_k_a[i],)
                drate = dfactor + db * unit
                if KEY_SCALE == "decay":
                    dz = (dz + dfactor * s * DECAY_SCALE) * gate * (1.0 - gate)
                else:
                    dz = (dz * gate - dfactor) * (1.0 - gate)
            drate = drate * rate * (1.0 - rate)
            w0 = w0 + (sum_w0[i] + dz,)
            a0 = a0 + (sum_a0[i] + drate,)
            _store_tile(dr_, G * R, start, head, row, column, inside, dr, D)
            _store_tile(ddecay_, G * R, start, head, row, column, inside, dz, D)
            _store_tile(diclr_, G * R, start, head, row, column, inside, drate, D)
        sum_w0 = w0
        sum_a0 = a0
        sum_r_k = r_k
        sum_k_k = k_k
        sum_k_a = k_a

        if KEY_SCALE != "k_a":
            dk += _from_unit(dunit, unit, unit_scale, scaled)
        if k_first_ is not None:
            _store_tile(dk_first_, G, start, g, row, column, inside, dk * share, D)
            dshare = dk * (k_first - own) * share * (1.0 - share)
            _store_tile(dkey_gate_, G, start, g, row, column, inside, dshare, D)
            sum_k0 += dshare
            dk = dk * (1.0 - share)
        if dkey_ is not None:
            dk += dkey
        dk, dweight = _from_rotated(dk, normed, scale, k_norm_, cos_, cos, sin, column, exists, D)
        _store_tile(dk_, G, start, g, row, column, inside, dk, D)
        sum_k_norm += dweight

    sums = span * sums_t
    for i in tl.static_range(R):
        at_head = sums + (g * R + i) * D
        if w0_ is not None:
            _store_sum(dw0_ + at_head, sum_w0[i], D, P)
            _store_sum(da0_ + at_head, sum_a0[i], D, P)
        if r_k_ is not None:
            _store_sum(dr_k_ + at_head, sum_r_k[i], D, P)
        if KEY_SCALE == "k_a":
            _store_sum(dk_k_ + at_head, sum_k_k[i], D, P)
            _store_sum(dk_a_ + at_head, sum_k_a[i], D, P)
    if r_norm_ is not None:
        _store_sum(dr_norm_ + sums + g * D, sum_r_norm, D, P)
        _store_sum(dk_norm_ + sums + g * D, sum_k_norm, D, P)
    if k_first_ is not None:
        _store_sum(dk0_ + sums + g * D, sum_k0, D, P)
    if v_first_ is not None:
        for i in tl.static_range(RV):
            _store_sum(dv0_ + sums + (g * RV + i) * D, sum_v0[i], D, P)


@triton.jit(do_not_specialize=RUNTIME)
def output_forward(
    y_, y_t, y_h, gate_, gate_t, gate_h, bonus_, bonus_t, bonus_h, v_, v_t, v_h,
    near_, near_t, near_h, weight_, weight_t, weight_h, mix_recurrence_, mix_window_,
    out_,
    scale, G, TOKENS,
    R: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Scale the output of the recurrence, add the bonus and gate the sum; with a window, mix both.

    Grid: (cdiv(TOKENS, BLOCK * BLOCKS) * G,), G being the heads of v, each shared by R heads. bonus_ and v_ are None
    without a bonus; near_ (what a window gives), the mixes, and the recurrence's weight_ without a window, the last one
    also without a score of what lies beyond it.
    """
    span, begin, g, row, column, exists = _place(G, BLOCK, BLOCKS, D, P)
    for step in range(BLOCKS):
        start = begin + step * BLOCK
        there = start + row < TOKENS
        inside = exists & there
        v = _tile(v_, v_t, v_h, start, g, row, column, inside)
        for i in tl.static_range(R):
            head = g * R + i
            y = scale * _tile(y_, y_t, y_h, start, head, row, column, inside)
            gate = _tile(gate_, gate_t, gate_h, start, head, row, column, inside)
            if bonus_ is not None:
                y += _tile(bonus_, bonus_t, bonus_h, start, head, row, 0, there) * v
            out = y * gate
            if near_ is not None:
                if weight_ is not None:
                    out *= _tile(weight_, weight_t, weight_h, start, head, row, 0, there)
                near = _tile(near_, near_t, near_h, start, head, row, column, inside)
                out = out * _load(mix_recurrence_ + head * D + column, exists)
                out += near * _load(mix_window_ + head * D + column, exists)
            _store_tile(out_, G * R, start, head, row, column, inside, out, D)


@triton.jit(do_not_specialize=RUNTIME)
def output_backward(
    y_, y_t, y_h, gate_, gate_t, gate_h, bonus_, bonus_t, bonus_h, v_, v_t, v_h,
    near_, near_t, near_h, weight_, weight_t, weight_h, mix_recurrence_, mix_window_,
    dout_, dout_t, dout_h,
    dy_, dgate_, dbonus_, dv_, dnear_, dweight_, sums_,
    scale, G, TOKENS,
    R: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of everything that `output_forward` reads; those of the mixes over a program's tokens."""
    span, begin, g, row, column, exists = _place(G, BLOCK, BLOCKS, D, P)
    sum_recurrence = ()
    sum_window = ()
    for _ in tl.static_range(R):
        sum_recurrence = sum_recurrence + (tl.zeros((BLOCK, 2 * P), tl.float32),)
        sum_window = sum_window + (tl.zeros((BLOCK, 2 * P), tl.float32),)
    for step in range(BLOCKS):
        start = begin + step * BLOCK
        there = start + row < TOKENS
        inside = exists & there
        v = _tile(v_, v_t, v_h, start, g, row, column, inside)
        dv = tl.zeros((BLOCK, 2 * P), tl.float32)
        recurrence = ()
        window = ()
        for i in tl.static_range(R):
            head = g * R + i
            y = scale * _tile(y_, y_t, y_h, start, head, row, column, inside)
            dout = _tile(dout_, dout_t, dout_h, start, head, row, column, inside)
            gate = _tile(gate_, gate_t, gate_h, start, head, row, column, inside)
            if bonus_ is not None:
                bonus = _tile(bonus_, bonus_t, bonus_h, start, head, row, 0, there)
                y += bonus * v
            if near_ is not None:
                near = _tile(near_, near_t, near_h, start, head, row, column, inside)
                dnear = dout * _load(mix_window_ + head * D + column, exists)
                _store_tile(dnear_, G * R, start, head, row, column, inside, dnear, D)
                window = window + (sum_window[i] + dout * near,)
                gated = y * gate
                own = dout * _load(mix_recurrence_ + head * D + column, exists)
                if weight_ is not None:
                    weight = _tile(weight_, weight_t, weight_h, start, head, row, 0, there)
                    tl.store(dweight_ + (start + row) * (G * R) + head, _sum_head(own * gated), mask=there)
                    recurrence = recurrence + (sum_recurrence[i] + dout * weight * gated,)
                    dout = own * weight
                else:
                    recurrence = recurrence + (sum_recurrence[i] + dout * gated,)
                    dout = own
            else:
                window = window + (sum_window[i],)
                recurrence = recurrence + (sum_recurrence[i],)
            d = dout * gate
            if bonus_ is not None:
                dv += bonus * d
                tl.store(dbonus_ + (start + row) * (G * R) + head, _sum_head(d * v), mask=there)
            _store_tile(dy_, G * R, start, head, row, column, inside, scale * d, D)
            _store_tile(dgate_, G * R, start, head, row, column, inside, dout * y, D)
        _store_tile(dv_, G, start, g, row, column, inside, dv, D)
        sum_recurrence = recurrence
        sum_window = window

    if near_ is not None:
        sums = span * (2 * G * R * D)
        for i in tl.static_range(R):
            at_head = sums + (g * R + i) * D
            _store_sum(sums_ + at_head, sum_recurrence[i], D, P)
            _store_sum(sums_ + G * R * D + at_head, sum_window[i], D, P)
