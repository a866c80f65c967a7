"""TimeMixer against an oracle that is written from the formulas alone, one token and one head at a time, in float64."""

import math

import pytest
import torch

from rwkvinside.modeling.first_layer import FirstLayerKV
from rwkvinside.modeling.mixer_init import init_mixer
from rwkvinside.modeling.mixer_presets import PRESETS, TimeMixerConfig, default_ranks
from rwkvinside.modeling.time_mixer import MixerState, TimeMixer

D, N, T, B = 24, 8, 13, 2
WINDOWS = {"": {}, "window": {"window": 4}, "softmax": {"window": 3, "sinks": 2, "window_mix": "softmax"}}


def make(preset, heads=4, kv_heads=2, is_first=False, **overrides):
    torch.manual_seed(0)
    kv_heads = heads if preset == "x070" else kv_heads
    config = TimeMixerConfig.from_preset(
        preset,
        qk_norm=True,
        hidden_size=D,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=N,
        qkv_bias=True,
        **overrides,
    )
    mixer = TimeMixer(config, is_first).double()
    init_mixer(mixer, 1, 3, "published")
    with torch.no_grad():  # every path active: nothing at its neutral start
        for p in mixer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return mixer


def rope_of(start=0, length=T):
    angle = torch.arange(start, start + length, dtype=torch.float64)[:, None] / 100 ** (torch.arange(N // 2) / (N // 2))
    angle = torch.cat([angle, angle], -1)
    return angle.cos()[None], angle.sin()[None]


def first_for(mixer, width=None):
    c = mixer.mixer_config
    if mixer.is_first:
        return None
    torch.manual_seed(7)
    heads = c.num_heads if c.value_path == "residual_full" else c.num_kv_heads
    v = torch.randn(B, T, heads, N, dtype=torch.float64, requires_grad=True)
    k = torch.randn(B, T, c.num_kv_heads, N, dtype=torch.float64, requires_grad=True)
    return FirstLayerKV(v, k if c.key_residual else None)


def oracle(m, preset, x, first, rope):
    """The equations of docs/mixer.md, written without looking at the implementation's order of operations."""
    c, p = m.mixer_config, dict(m.named_parameters())
    f = PRESETS[preset]
    H, G = c.num_heads, c.num_kv_heads
    R = H // G
    sigmoid, eps = torch.sigmoid, c.norm_eps
    rows = []
    for b in range(x.shape[0]):
        S = [torch.zeros(N, N, dtype=x.dtype) for _ in range(H)]
        outs, attended = [], []
        for t in range(x.shape[1]):
            xt = x[b, t]
            if f.get("token_shift"):
                before = x[b, t - 1] if t else torch.zeros_like(xt)
                xr, xw, xk, xv, xa, xg = (xt + (before - xt) * p[f"x_{n}"][0, 0] for n in "rwkvag")
            else:
                xr = xw = xk = xv = xa = xg = xt
            r, k, v = (
                p[f"{name}.weight"] @ given + (p[f"{name}.bias"] if f.get("qkv_bias", True) else 0)
                for name, given in (("receptance", xr), ("key", xk), ("value", xv))
            )

            def per_head(vector, weight, t=t):
                parts = []
                for part in vector.split(N):
                    if c.qk_norm:
                        part = part / (part.pow(2).mean() + eps).sqrt() * weight
                    if f["rope"]:
                        cos, sin = rope[0][0, t], rope[1][0, t]
                        a, b = part[: N // 2], part[N // 2 :]
                        part = torch.cat([a * cos[: N // 2] - b * sin[: N // 2], b * cos[N // 2 :] + a * sin[N // 2 :]])
                    parts.append(part)
                return parts

            r, k, v = per_head(r, p.get("r_norm.weight")), per_head(k, p.get("k_norm.weight")), list(v.split(N))
            attended.append((k, v))  # what a window attends to
            z = (p["w0"][0, 0] + p["w2"].T @ torch.tanh(p["w1"].T @ xw)).split(N)
            iclr = sigmoid(p["a0"][0, 0] + p["a2"].T @ (p["a1"].T @ xa)).split(N)
            gate = (p["g2"].T @ sigmoid(p["g1"].T @ xg)).split(N)
            if first is not None and f["value_path"] == "residual_kv":
                mix = sigmoid(p["v0"][0, 0] + p["v2"].T @ (p["v1"].T @ xv)).split(N)
                v = [v[g] + (first.v[b, t, g] - v[g]) * mix[g] for g in range(G)]
            if first is not None and f["key_residual"]:
                mix = sigmoid(p["k0"][0, 0] + p["k2"].T @ (p["k1"].T @ xk)).split(N)
                k = [k[g] + (first.k[b, t, g] - k[g]) * mix[g] for g in range(G)]
            k, v = [k[h // R] for h in range(H)], [v[h // R] for h in range(H)]
            if first is not None and f["value_path"] == "residual_full":
                mix = sigmoid(p["v0"][0, 0] + p["v2"].T @ (p["v1"].T @ xv)).split(N)
                v = [v[h] + (first.v[b, t, h] - v[h]) * mix[h] for h in range(H)]
            if f["value_path"] == "additive":
                extra = (p["v2"].T @ (p["v1"].T @ xv)).split(N)
                v = [v[h] + 0.2 * extra[h] for h in range(H)]
            out = []
            for h in range(H):
                wl = -torch.log1p(torch.exp(-z[h])) - 0.5
                d = torch.exp(-torch.exp(wl))
                if f["key_scale"] == "k_a":
                    kk = k[h] * p["k_k"][0, 0].split(N)[h]
                    kh = k[h] * (1 + (iclr[h] - 1) * p["k_a"][0, 0].split(N)[h])
                else:
                    kk = k[h]
                    kh = k[h] * (1 - (d if f["key_scale"] == "decay" else wl) + iclr[h])
                kk = kk / kk.norm()
                S[h] = S[h] * d[None, :] + torch.outer(S[h] @ -kk, kk * iclr[h]) + torch.outer(v[h], kh)
                y = S[h] @ r[h]
                if f.get("group_norm"):
                    y = (y - y.mean()) / (y.var(unbiased=False) + 64e-5).sqrt()
                    y = y * p["ln_x.weight"].split(N)[h] + p["ln_x.bias"].split(N)[h]
                else:
                    y = y / math.sqrt(N)
                if f["bonus"]:
                    y = y + (r[h] * kh * p["r_k"][h]).sum() * v[h]
                y = y * gate[h]
                if c.window:
                    seen = [attended[j] for j in range(t + 1) if j > t - c.window or j < c.sinks]
                    scores = [r[h] @ keys[h // R] / math.sqrt(N) for keys, _ in seen]
                    values = [values[h // R] for _, values in seen]
                    far = t + 1 - len(seen)
                    if c.window_mix == "softmax":
                        score = r[h] @ p["far_key"][h] + p["far_bias"][h] + p["far_growth"][h] * math.log(max(far, 1))
                        scores += [score] if far else []
                    weights = torch.stack(scores).softmax(0)
                    a = sum(weight * value for weight, value in zip(weights, values, strict=False))
                    if c.window_mix == "softmax":
                        y = weights[-1] * y if far else 0 * y
                    y = p["mix_recurrence"][h] * y + p["mix_window"][h] * a
                out.append(y)
            outs.append(p["output.weight"] @ torch.cat(out))
        rows.append(torch.stack(outs))
    return torch.stack(rows)


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("is_first, kv_heads", [(True, 2), (False, 2), (False, 4)], ids=["first", "GQA", "MHA"])
@pytest.mark.parametrize("window", list(WINDOWS.values()), ids=list(WINDOWS))
def test_equals_the_oracle_with_all_gradients(preset, is_first, kv_heads, window):
    mixer = make(preset, kv_heads=kv_heads, is_first=is_first, **window)
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    rope, first = rope_of(), first_for(mixer)
    weight = torch.randn(B, T, D, dtype=torch.float64)
    leaves = [x, *mixer.parameters(), *(t for t in first or () if t is not None)]

    y, *_ = mixer(x, first=first, rope=rope)
    expected = oracle(mixer, preset, x, first, rope)
    assert (y - expected).abs().max() < 1e-10
    got = torch.autograd.grad((y * weight).sum(), leaves, allow_unused=True)
    wanted = torch.autograd.grad((expected * weight).sum(), leaves, allow_unused=True)
    for g, w in zip(got, wanted, strict=True):
        if w is None:  # a v_first that this preset does not read
            assert g is None
        else:
            assert (g - w).abs().max() < 1e-10 * max(1, w.abs().max())


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("window", [WINDOWS[""], WINDOWS["softmax"]], ids=["", "softmax"])
def test_state_carries_a_split_sequence(preset, window):
    mixer = make(preset, is_first=True, **window)
    x = torch.randn(B, T, D, dtype=torch.float64)
    whole, _, end = mixer(x, first=None, rope=rope_of())
    a, _, state = mixer(x[:, :5], first=None, rope=rope_of(0, 5))
    b, _, last = mixer(x[:, 5:], first=None, rope=rope_of(5, T - 5), state=state)
    assert torch.allclose(torch.cat([a, b], 1), whole, atol=1e-12)
    assert all(torch.allclose(p, q, atol=1e-12) for p, q in zip(last.tensors(), end.tensors(), strict=True))
    for t in range(T):  # token by token
        y, _, state = mixer(x[:, t : t + 1], first=None, rope=rope_of(t, 1), state=state if t else None)
        assert torch.allclose(y[:, 0], whole[:, t], atol=1e-12)


@pytest.mark.parametrize("preset", ["cxa079", "x070"])
@pytest.mark.parametrize("window", [WINDOWS[""], WINDOWS["softmax"]], ids=["", "softmax"])
def test_padding_on_either_side_and_packed_documents(preset, window):
    mixer = make(preset, is_first=True, **window)
    x = torch.randn(B, T, D, dtype=torch.float64)
    alone, _, state = mixer(x, first=None, rope=rope_of())
    junk = torch.randn(B, 3, D, dtype=torch.float64)
    mask = torch.ones(B, T + 6, dtype=torch.bool)
    mask[:, :3] = mask[:, -3:] = False
    padded, _, after = mixer(torch.cat([junk, x, junk], 1), first=None, rope=rope_of(-3, T + 6), mask=mask)
    assert torch.allclose(padded[:, 3:-3], alone, atol=1e-12)
    assert all(torch.allclose(p, q, atol=1e-12) for p, q in zip(after.tensors(), state.tensors(), strict=True))

    # two rows of [5 tokens | 8 tokens]: each document as if it were alone
    cu = torch.tensor([0, 5, T, T + 5, 2 * T], dtype=torch.int32)
    rope = tuple(torch.cat([p, q], 1) for p, q in zip(rope_of(0, 5), rope_of(0, T - 5), strict=True))
    packed, _, ends = mixer(x, first=None, rope=rope, cu_seqlens=cu)
    one, _, s1 = mixer(x[:, :5], first=None, rope=rope_of(0, 5))
    two, _, s2 = mixer(x[:, 5:], first=None, rope=rope_of(0, T - 5))
    assert torch.allclose(packed, torch.cat([one, two], 1), atol=1e-12)
    expected = MixerState(
        *(None if p is None else torch.stack([p, q], 1).flatten(0, 1) for p, q in zip(s1[:2], s2[:2], strict=True))
    )
    assert ends.window is None, "of documents that may be shorter than it"
    assert all(p is None or torch.allclose(p, q, atol=1e-12) for p, q in zip(ends, expected, strict=True))


def test_detach_first_cuts_the_gradient_and_only_that():
    for detach in (False, True):
        mixer = make("cxa079", detach_first=detach)
        first = first_for(mixer)
        y, *_ = mixer(torch.randn(B, T, D, dtype=torch.float64), first=first, rope=rope_of())
        y.sum().backward()
        assert (first.v.grad is None) == detach and (first.k.grad is None) == detach


def test_calibrated_init_starts_neutral():
    config = TimeMixerConfig.from_preset(
        "cxa079", qk_norm=False, hidden_size=128, num_heads=4, num_kv_heads=2, head_size=32
    )
    mixer = TimeMixer(config, is_first=False)
    init_mixer(mixer, 1, 4, "calibrated")
    x = torch.randn(1, 9, 128)
    first = FirstLayerKV(torch.randn(1, 9, 2, 32), torch.randn(1, 9, 2, 32))
    rope = (torch.ones(1, 9, 32), torch.zeros(1, 9, 32))
    s = mixer.recurrence_inputs(mixer.project_inputs(x, first=first, rope=rope)[0])
    assert torch.allclose(s.gate, torch.ones_like(s.gate), atol=1e-5)
    plain = mixer.value(x).view(1, 9, 2, 32)
    assert (s.v - plain).abs().max() < 0.02 * (first.v.abs().max() + plain.abs().max())


def test_ranks_of_published_sizes():
    # Qwen3-14B (C = 5120) as the published rule gives them, and a small teacher whose floors shrink
    assert default_ranks(5120, 5120) == dict(decay=288, iclr=128, value=96, key=96, gate=320)
    assert default_ranks(64, 64) == dict(decay=32, iclr=32, value=32, key=32, gate=16)


def test_bf16_keeps_decay_and_rate_in_fp32():
    mixer = make("cxa079", is_first=True).float()
    x = torch.randn(1, T, D)
    rope = tuple(t.float() for t in rope_of())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        s = mixer.recurrence_inputs(mixer.project_inputs(x, first=None, rope=rope)[0])
        y, _, state = mixer(x, first=None, rope=rope)
    assert s.log_decay.dtype == s.iclr.dtype == s.kk.dtype == torch.float32 and state.wkv.dtype == torch.float32
    exact, *_ = mixer(x, first=None, rope=rope)
    assert (y.float() - exact).norm() / exact.norm() < 0.02  # bf16 has 8 bits: 0.4 % an operation, a dozen of them


def test_bad_choices_are_named():
    base = dict(hidden_size=D, num_heads=4, num_kv_heads=2, head_size=N)
    with pytest.raises(ValueError, match="'nope'"):
        TimeMixerConfig.from_preset("nope", qk_norm=False, **base)
    with pytest.raises(ValueError, match="key_scale is 'linear'"):
        TimeMixerConfig(**base, key_scale="linear")
    for window in ({"sinks": 1}, {"window": -1}, {"window": 4, "sinks": -1}):
        with pytest.raises(ValueError, match="neither is negative, sinks need a window"):
            TimeMixerConfig(**base, **window)
    with pytest.raises(ValueError, match="does not divide"):
        TimeMixerConfig(**(base | dict(num_kv_heads=3)))
    with pytest.raises(ValueError, match="unknown mixer fields"):
        TimeMixerConfig.from_dict(base | dict(color="red"))


def test_a_new_mixer_is_initialized():
    """By its constructor alone it computes something finite, as it was told to begin."""
    config = TimeMixerConfig.from_preset(
        "x070", qk_norm=True, hidden_size=D, num_heads=4, num_kv_heads=4, head_size=N, qkv_bias=True
    )
    torch.manual_seed(0)
    mixer = TimeMixer(config, False, layer=1, num_layers=3, init="published")
    y, *_ = mixer(torch.randn(B, T, D), first=FirstLayerKV(torch.randn(B, T, 4, N), None))
    assert y.isfinite().all() and mixer.r_k.eq(-0.04).all() and mixer.v0.eq(0.73).all()
    again = TimeMixer(config, False)
    init_mixer(again, 1, 3, "published")
    assert torch.equal(again.w0, mixer.w0) and not torch.equal(TimeMixer(config, False).w0, mixer.w0)
    with torch.device("meta"):
        assert TimeMixer(config, False).w0.is_meta


@pytest.mark.parametrize("length", [1, T])
def test_a_mixer_that_rotates_asks_for_positions(length):
    mixer = make("cxa079", is_first=True)
    x = torch.randn(B, length, D, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"give rope=\(cos, sin\)"):
        mixer(x, first=None)
    make("cxa079", is_first=True, rope=False)(x, first=None)


def test_the_state_of_a_token_shift_keeps_no_more_than_a_token():
    """Not the prompt; and what the next token overwrites is nobody else's."""
    mixer, x = make("x070", is_first=True), torch.randn(1, 9, D, dtype=torch.float64)
    _, _, state = mixer(x, first=None)
    assert state.shift.untyped_storage().nbytes() == state.shift.nbytes
    assert torch.equal(state.shift, x[:, -1]) and state.shift.data_ptr() != x[:, -1].data_ptr()


@pytest.mark.parametrize("masked", [False, True])
def test_packed_documents_go_on_from_their_states(masked):
    """Documents in two calls, empty ones in both, are what each is alone, with every gradient."""
    mixer = make("x070", is_first=True)
    lengths = ((0, 5, 0, 4, 0), (3, 0, 2, 6, 0))
    parts = [[torch.randn(n, D, dtype=torch.float64, requires_grad=True) for n in call] for call in lengths]
    masks = [[torch.ones(n, dtype=torch.bool) for n in call] for call in lengths]
    if masked:
        for call, document, places in ((0, 1, [0, 4]), (0, 3, [1]), (1, 0, [0, 1, 2]), (1, 3, [0, 5])):
            masks[call][document][places] = False

    def call(x, mask, state, cu=None):
        y, _, state = mixer(x[None], first=None, state=state, mask=mask[None] if masked else None, cu_seqlens=cu)
        return y[0], state

    inputs = [x for xs in parts for x in xs if len(x)] + [mixer.x_r, mixer.x_v, mixer.receptance.weight]

    def gradients(outputs):
        return torch.autograd.grad(sum(y.square().sum() for y in outputs), inputs)

    state, together = None, []
    for xs, ms in zip(parts, masks, strict=True):
        cu = torch.tensor([0, *(len(x) for x in xs)]).cumsum(0).int()
        y, state = call(torch.cat(xs), torch.cat(ms), state, cu)
        together.append(y[torch.cat(ms)])
    alone = [[], []]
    for document in range(5):
        own = None
        for i in range(2):
            x, m = parts[i][document], masks[i][document]
            if len(x):
                y, own = call(x, m, own)
                alone[i].append(y[m])
        for found, expected in zip(state.tensors(), own.tensors() if own else [None] * 2, strict=True):
            expected = torch.zeros_like(found[document]) if expected is None else expected[0]
            torch.testing.assert_close(found[document], expected, rtol=0, atol=1e-12)
    alone = [torch.cat(ys) for ys in alone]
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients(together), gradients(alone), rtol=0, atol=1e-10)
