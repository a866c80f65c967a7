"""The Triton kernels of the work around the WKV-7 recurrence: from projections to its inputs, from its output on.

They only compute; `mixer.py` decides on buffers and launches, docs/mixer.md has the equations. Everything is pointwise
or a sum over one head, so bytes are what counts: a program owns a block of tokens and one head of keys and values with
the heads that share it. It reads each projection once, computes in fp32, and the backward computes again what the
forward did not write. What heads share is summed inside a program, and gradients of parameters are written as one sum
per block of tokens, to be added afterwards: no atomics.

Token tensors are (token, head, column) with contiguous columns, their strides `_t` and `_h`. A tile is [tokens, columns
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
def _place(G, TOKENS, BLOCK: tl.constexpr, D: tl.constexpr, P: tl.constexpr):
    """Locate a program: its block, its head of keys and values, its tokens [BLOCK, 1] and columns [BLOCK, 2 P].

    Also returns which places of a tile exist.
    """
    program = tl.program_id(0)
    block = (program // G).to(tl.int64)
    token = block * BLOCK + tl.arange(0, BLOCK)[:, None]
    column, exists = _columns(D, P)
    # of parameters too, every token reads its own copy: a row shared by all would get another layout than the tiles
    column = tl.broadcast_to(column[None, :], (BLOCK, 2 * P))
    return block, (program % G).to(tl.int64), token, column, exists[None, :] & (token < TOKENS)


@triton.jit
def _columns(D: tl.constexpr, P: tl.constexpr):
    """Return the columns of a padded head, and which of them exist."""
    i = tl.arange(0, 2 * P)
    return i // P * (D // 2) + i % P, i % P < D // 2


@triton.jit
def _load(pointers, inside):
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _sum_head(x):
    """Sum a tile over its columns, to [BLOCK, 1]."""
    return tl.sum(x, axis=1, keep_dims=True)


@triton.jit
def _store_sum(row_, x, D: tl.constexpr, P: tl.constexpr):
    """Store the sum of a tile over its tokens in a row of D columns."""
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
        scale = 1.0 / tl.sqrt(_sum_head(x * x) * (1.0 / D) + eps)
        return x * scale, scale
    else:
        return x, 1.0


@triton.jit
def _rotated(normed, norm_, cos_, cos, sin, column, inside):
    """Weight a normed tile and rotate it, where there are weights and a rotation."""
    if norm_ is not None:
        normed = normed * _load(norm_ + column, inside)
    if cos_ is not None:
        return normed * cos + _turned(normed) * sin
    else:
        return normed


@triton.jit
def _from_rotated(d, normed, scale, norm_, cos_, cos, sin, column, inside, D: tl.constexpr):
    """Return the gradient of a tile before norm and rotation, and the tile whose sum is that of the norm's weight."""
    if cos_ is not None:
        d = d * cos - _turned(d * sin)
    if norm_ is not None:
        dweight = d * normed
        d = d * _load(norm_ + column, inside)
        return scale * (d - normed * (_sum_head(d * normed) * (1.0 / D))), dweight
    else:
        return d, d


@triton.jit
def _key(
    k_, k_t, k_h, key_gate_, key_gate_t, key_gate_h, k_first_, k_first_t, k_first_h,
    k_norm_, k0_, cos_, cos, sin, g, token, column, inside, eps, D: tl.constexpr,
):  # fmt: skip
    """Compute the key of a group.

    Returns the normed projection, its scale, the key before its residual mix, after it, and the first layer's share.
    """
    normed, scale = _normed(_load(k_ + token * k_t + g * k_h + column, inside), k_norm_, eps, D)
    own = _rotated(normed, k_norm_, cos_, cos, sin, column, inside)
    if k_first_ is not None:
        share = tl.sigmoid(
            _load(key_gate_ + token * key_gate_t + g * key_gate_h + column, inside)
            + _load(k0_ + g * D + column, inside)
        )
        first = _load(k_first_ + token * k_first_t + g * k_first_h + column, inside)
        return normed, scale, own, own + (first - own) * share, share
    else:
        return normed, scale, own, own, own


@triton.jit
def _unit(x):
    """Return the rows of a tile scaled to length one, and what they were multiplied by."""
    length = tl.sqrt(_sum_head(x * x))
    scale = 1.0 / tl.maximum(length, SHORTEST)
    return x * scale, scale, length > SHORTEST


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


@triton.jit(do_not_specialize=RUNTIME)
def inputs_forward(
    r_, r_t, r_h, k_, k_t, k_h, v_, v_t, v_h, decay_, decay_t, decay_h, iclr_, iclr_t, iclr_h,
    key_gate_, key_gate_t, key_gate_h, k_first_, k_first_t, k_first_h,
    value_gate_, value_gate_t, value_gate_h, v_first_, v_first_t, v_first_h,
    cos_, cos_t, sin_, sin_t, r_norm_, k_norm_, w0_, a0_, k0_, v0_, r_k_, k_k_, k_a_,
    r_out_, w_out_, k_out_, v_out_, a_out_, b_out_, bonus_, key_,
    eps, G, TOKENS, POSITIONS,
    R: tl.constexpr, RV: tl.constexpr, FIRST: tl.constexpr, KEY_SCALE: tl.constexpr,
    BLOCK: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Compute the inputs of the recurrence for a block of tokens and the R heads of a group.

    Grid: (blocks * G,). v has RV heads a group. FIRST of them read one head of v_first. Absent tensors are None: no
    residual mix, no rotation, no norm, no bonus. `key_` takes the key before its residual mix, which later layers read.
    """
    block, g, token, column, inside = _place(G, TOKENS, BLOCK, D, P)
    cos = 1.0
    sin = 0.0
    if cos_ is not None:
        cos = _load(cos_ + token % POSITIONS * cos_t + column, inside)
        sin = _load(sin_ + token % POSITIONS * sin_t + column, inside)

    _, _, own_key, k, _ = _key(
        k_, k_t, k_h, key_gate_, key_gate_t, key_gate_h, k_first_, k_first_t, k_first_h,
        k_norm_, k0_, cos_, cos, sin, g, token, column, inside, eps, D,
    )  # fmt: skip
    per_group = (token * G + g) * D + column
    if key_ is not None:
        _store(key_ + per_group, own_key, inside)
    if KEY_SCALE != "k_a":
        unit, scale, scaled = _unit(k)
        _store(a_out_ + per_group, -unit, inside)

    for i in range(R):
        head = g * R + i
        at_head = head * D + column
        per_head = token * (G * R * D) + at_head
        normed, scale = _normed(_load(r_ + token * r_t + head * r_h + column, inside), r_norm_, eps, D)
        r = _rotated(normed, r_norm_, cos_, cos, sin, column, inside)
        _store(r_out_ + per_head, r, inside)
        z = _load(decay_ + token * decay_t + head * decay_h + column, inside) + _load(w0_ + at_head, inside)
        gate, w, s = _decay(z, KEY_SCALE)
        _store(w_out_ + per_head, w, inside)
        rate = tl.sigmoid(_load(iclr_ + token * iclr_t + head * iclr_h + column, inside) + _load(a0_ + at_head, inside))
        if KEY_SCALE == "k_a":
            unit, scale, scaled = _unit(k * _load(k_k_ + at_head, inside))
            _store(a_out_ + per_head, -unit, inside)
            scaled_key = k * (1.0 + (rate - 1.0) * _load(k_a_ + at_head, inside))
        else:
            scaled_key = k * (1.0 - s + rate)
        _store(b_out_ + per_head, rate * unit, inside)
        _store(k_out_ + per_head, scaled_key, inside)
        if bonus_ is not None:
            bonus = _sum_head(r * scaled_key * _load(r_k_ + at_head, inside))
            tl.store(bonus_ + token * (G * R) + head, bonus, mask=token < TOKENS)

    if v_out_ is not None:
        v = _load(v_ + token * v_t + g * v_h + column, inside)
        for i in range(RV):
            head = g * RV + i
            mix = _load(value_gate_ + token * value_gate_t + head * value_gate_h + column, inside)
            if v_first_ is not None:
                share = tl.sigmoid(mix + _load(v0_ + head * D + column, inside))
                first = _load(v_first_ + token * v_first_t + head // FIRST * v_first_h + column, inside)
                mixed = v + (first - v) * share
            else:
                mixed = v + mix * ADDITIVE_SCALE
            _store(v_out_ + token * (G * RV * D) + head * D + column, mixed, inside)


@triton.jit(do_not_specialize=RUNTIME)
def inputs_backward(
    r_, r_t, r_h, k_, k_t, k_h, v_, v_t, v_h, decay_, decay_t, decay_h, iclr_, iclr_t, iclr_h,
    key_gate_, key_gate_t, key_gate_h, k_first_, k_first_t, k_first_h,
    value_gate_, value_gate_t, value_gate_h, v_first_, v_first_t, v_first_h,
    cos_, cos_t, sin_, sin_t, r_norm_, k_norm_, w0_, a0_, k0_, v0_, r_k_, k_k_, k_a_,
    dr_out_, dr_out_t, dr_out_h, dw_out_, dw_out_t, dw_out_h, dk_out_, dk_out_t, dk_out_h,
    dv_out_, dv_out_t, dv_out_h, da_out_, da_out_t, da_out_h, db_out_, db_out_t, db_out_h,
    dbonus_, dbonus_t, dbonus_h, dkey_, dkey_t, dkey_h,
    dr_, dk_, dv_, ddecay_, diclr_, dkey_gate_, dk_first_, dvalue_gate_, dv_first_,
    dr_norm_, dk_norm_, dw0_, da0_, dk0_, dv0_, dr_k_, dk_k_, dk_a_, sums_t,
    eps, G, TOKENS, POSITIONS,
    R: tl.constexpr, RV: tl.constexpr, FIRST: tl.constexpr, KEY_SCALE: tl.constexpr,
    BLOCK: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of everything that `inputs_forward` reads.

    Gradients of parameters are sums over the block's tokens, `sums_t` apart from block to block. dk_first_ and
    dv_first_ are None where nobody asks for them; dv_first_ has the heads of v_first.
    """
    block, g, token, column, inside = _place(G, TOKENS, BLOCK, D, P)
    cos = 1.0
    sin = 0.0
    if cos_ is not None:
        cos = _load(cos_ + token % POSITIONS * cos_t + column, inside)
        sin = _load(sin_ + token % POSITIONS * sin_t + column, inside)
    sums = block * sums_t
    per_group = (token * G + g) * D + column

    _, _, _, k, _ = _key(
        k_, k_t, k_h, key_gate_, key_gate_t, key_gate_h, k_first_, k_first_t, k_first_h,
        k_norm_, k0_, cos_, cos, sin, g, token, column, inside, eps, D,
    )  # fmt: skip
    dk = tl.zeros_like(k)
    dr_weight = tl.zeros_like(k)
    if KEY_SCALE != "k_a":
        _, unit_scale, scaled = _unit(k)
        dunit = -_load(da_out_ + token * da_out_t + g * da_out_h + column, inside)

    for i in range(R):
        head = g * R + i
        at_head = head * D + column
        per_head = token * (G * R * D) + at_head
        z = _load(decay_ + token * decay_t + head * decay_h + column, inside) + _load(w0_ + at_head, inside)
        gate, w, s = _decay(z, KEY_SCALE)
        rate = tl.sigmoid(_load(iclr_ + token * iclr_t + head * iclr_h + column, inside) + _load(a0_ + at_head, inside))
        if KEY_SCALE == "k_a":
            k_k = _load(k_k_ + at_head, inside)
            k_a = _load(k_a_ + at_head, inside)
            unit, unit_scale, scaled = _unit(k * k_k)
            dunit = -_load(da_out_ + token * da_out_t + head * da_out_h + column, inside)
            factor = 1.0 + (rate - 1.0) * k_a
        else:
            unit = k * unit_scale
            factor = 1.0 - s + rate

        normed_r, scale_r = _normed(_load(r_ + token * r_t + head * r_h + column, inside), r_norm_, eps, D)
        dr = _load(dr_out_ + token * dr_out_t + head * dr_out_h + column, inside)
        dkey = _load(dk_out_ + token * dk_out_t + head * dk_out_h + column, inside)
        if dbonus_ is not None:
            r = _rotated(normed_r, r_norm_, cos_, cos, sin, column, inside)
            r_k = _load(r_k_ + at_head, inside)
            dbonus = tl.load(dbonus_ + token * dbonus_t + head * dbonus_h, mask=token < TOKENS, other=0.0)
            _store_sum(dr_k_ + sums + head * D, dbonus * r * (k * factor), D, P)
            dr += dbonus * (k * factor) * r_k
            dkey += dbonus * r * r_k
        dr, dweight = _from_rotated(dr, normed_r, scale_r, r_norm_, cos_, cos, sin, column, inside, D)
        _store(dr_ + per_head, dr, inside)
        dr_weight += dweight

        db = _load(db_out_ + token * db_out_t + head * db_out_h + column, inside)
        dfactor = dkey * k
        dk += dkey * factor
        dunit += db * rate
        dz = _load(dw_out_ + token * dw_out_t + head * dw_out_h + column, inside) * -DECAY_SCALE
        if KEY_SCALE == "k_a":
            dq = _from_unit(dunit, unit, unit_scale, scaled)
            _store_sum(dk_k_ + sums + head * D, dq * k, D, P)
            _store_sum(dk_a_ + sums + head * D, dfactor * (rate - 1.0), D, P)
            dk += dq * k_k
            drate = dfactor * k_a + db * unit
            dz = dz * gate * (1.0 - gate)
        else:
            drate = dfactor + db * unit
            if KEY_SCALE == "decay":
                dz = (dz + dfactor * s * DECAY_SCALE) * gate * (1.0 - gate)
            else:
                dz = (dz * gate - dfactor) * (1.0 - gate)
        _store(ddecay_ + per_head, dz, inside)
        _store_sum(dw0_ + sums + head * D, dz, D, P)
        drate = drate * rate * (1.0 - rate)
        _store(diclr_ + per_head, drate, inside)
        _store_sum(da0_ + sums + head * D, drate, D, P)

    if r_norm_ is not None:
        _store_sum(dr_norm_ + sums + g * D, dr_weight, D, P)
    if KEY_SCALE != "k_a":
        dk += _from_unit(dunit, k * unit_scale, unit_scale, scaled)
    # again, so that the loop has the registers
    normed, scale, own, _, share = _key(
        k_, k_t, k_h, key_gate_, key_gate_t, key_gate_h, k_first_, k_first_t, k_first_h,
        k_norm_, k0_, cos_, cos, sin, g, token, column, inside, eps, D,
    )  # fmt: skip
    if k_first_ is not None:
        if dk_first_ is not None:
            _store(dk_first_ + per_group, dk * share, inside)
        first = _load(k_first_ + token * k_first_t + g * k_first_h + column, inside)
        dshare = dk * (first - own) * share * (1.0 - share)
        _store(dkey_gate_ + per_group, dshare, inside)
        _store_sum(dk0_ + sums + g * D, dshare, D, P)
        dk = dk * (1.0 - share)
    if dkey_ is not None:
        dk += _load(dkey_ + token * dkey_t + g * dkey_h + column, inside)
    dk, dweight = _from_rotated(dk, normed, scale, k_norm_, cos_, cos, sin, column, inside, D)
    _store(dk_ + per_group, dk, inside)
    if k_norm_ is not None:
        _store_sum(dk_norm_ + sums + g * D, dweight, D, P)

    if dv_out_ is not None:
        v = _load(v_ + token * v_t + g * v_h + column, inside)
        dv = tl.zeros_like(v)
        dfirst = tl.zeros_like(v)
        for i in range(RV):
            head = g * RV + i
            per_value = token * (G * RV * D) + head * D + column
            d = _load(dv_out_ + token * dv_out_t + head * dv_out_h + column, inside)
            if v_first_ is not None:
                share = tl.sigmoid(
                    _load(value_gate_ + token * value_gate_t + head * value_gate_h + column, inside)
                    + _load(v0_ + head * D + column, inside)
                )
                first = _load(v_first_ + token * v_first_t + head // FIRST * v_first_h + column, inside)
                dshare = d * (first - v) * share * (1.0 - share)
                _store(dvalue_gate_ + per_value, dshare, inside)
                _store_sum(dv0_ + sums + head * D, dshare, D, P)
                dv += d * (1.0 - share)
                if dv_first_ is not None:
                    if FIRST == 1:
                        _store(dv_first_ + per_value, d * share, inside)
                    else:
                        dfirst += d * share
            else:
                _store(dvalue_gate_ + per_value, d * ADDITIVE_SCALE, inside)
                dv += d
        _store(dv_ + per_group, dv, inside)
        if dv_first_ is not None and FIRST != 1:
            _store(dv_first_ + per_group, dfirst, inside)


@triton.jit(do_not_specialize=RUNTIME)
def output_forward(
    y_, y_t, y_h, gate_, gate_t, gate_h, bonus_, bonus_t, bonus_h, v_, v_t, v_h,
    out_,
    scale, G, TOKENS,
    R: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Scale the output of the recurrence, add the bonus and gate the sum.

    Grid: (blocks * G,), G being the heads of v, each shared by R heads. bonus_ and v_ are None without a bonus.
    """
    block, g, token, column, inside = _place(G, TOKENS, BLOCK, D, P)
    if bonus_ is not None:
        v = _load(v_ + token * v_t + g * v_h + column, inside)
    for i in range(R):
        head = g * R + i
        y = scale * _load(y_ + token * y_t + head * y_h + column, inside)
        if bonus_ is not None:
            y += tl.load(bonus_ + token * bonus_t + head * bonus_h, mask=token < TOKENS, other=0.0) * v
        gate = _load(gate_ + token * gate_t + head * gate_h + column, inside)
        _store(out_ + token * (G * R * D) + head * D + column, y * gate, inside)


@triton.jit(do_not_specialize=RUNTIME)
def output_backward(
    y_, y_t, y_h, gate_, gate_t, gate_h, bonus_, bonus_t, bonus_h, v_, v_t, v_h,
    dout_, dout_t, dout_h,
    dy_, dgate_, dbonus_, dv_,
    scale, G, TOKENS,
    R: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of everything that `output_forward` reads."""
    block, g, token, column, inside = _place(G, TOKENS, BLOCK, D, P)
    if bonus_ is not None:
        v = _load(v_ + token * v_t + g * v_h + column, inside)
        dv = tl.zeros_like(v)
    for i in range(R):
        head = g * R + i
        per_head = token * (G * R * D) + head * D + column
        y = scale * _load(y_ + token * y_t + head * y_h + column, inside)
        dout = _load(dout_ + token * dout_t + head * dout_h + column, inside)
        d = dout * _load(gate_ + token * gate_t + head * gate_h + column, inside)
        _store(dy_ + per_head, scale * d, inside)
        if bonus_ is not None:
            bonus = tl.load(bonus_ + token * bonus_t + head * bonus_h, mask=token < TOKENS, other=0.0)
            y += bonus * v
            dv += bonus * d
            tl.store(dbonus_ + token * (G * R) + head, _sum_head(d * v), mask=token < TOKENS)
        _store(dgate_ + per_head, dout * y, inside)
    if bonus_ is not None:
        _store(dv_ + (token * G + g) * D + column, dv, inside)
