"""The fused mixer in Triton's interpreter or on a GPU. Run by test_mixer.py, or directly:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/mixer_cases.py

A whole mixer with the backend "triton" is compared with the same mixer in PyTorch and float64: outputs, what it hands
to later layers, and every gradient. Where the recurrence itself is not of interest, a pointwise function stands in for
it on both sides, which adds no error of its own. The measure is the relative L2 distance.
"""

import copy

import pytest
import torch

from rwkvinside.kernels.gpu import mixer as ops
from rwkvinside.kernels.gpu.kernels import INTERPRETED
from rwkvinside.modeling import fused_mixer, time_mixer
from rwkvinside.modeling.first_layer import FirstLayerKV
from rwkvinside.modeling.mixer_init import init_mixer
from rwkvinside.modeling.mixer_presets import PRESETS, TimeMixerConfig
from rwkvinside.modeling.time_mixer import MixerState, TimeMixer

DEVICE = "cpu" if INTERPRETED.value else "cuda"
D = 24
T = 19  # of two rows: several programs of every kernel, the last ones not full
WINDOWED = {"window": 5, "sinks": 2, "window_mix": "softmax"}
CLOSE = 1e-6 if INTERPRETED.value else 5e-6  # a GPU's exp2, log, and order of summation cost a little


def stand_in(r, log_decay, k, v, a, b, state=None, **_):
    """Something that depends on every input, each in another way."""
    k, v, a, b = (x.repeat_interleave(r.shape[2] // x.shape[2], 2) for x in (k, v, a, b))
    y = r + log_decay * k + a * v + 0.5 * b * r + 0.3 * v
    return y.to(v.dtype), r.new_zeros(r.shape[0], r.shape[2], r.shape[3], r.shape[3])


@pytest.fixture
def no_recurrence(monkeypatch):
    monkeypatch.setattr(time_mixer, "wkv7", stand_in)


def make(preset, N=16, heads=4, kv_heads=2, is_first=False, **overrides):
    """A mixer in fp32 of which every path is active, and the reference in float64 with the same parameters."""
    torch.manual_seed(0)
    config = TimeMixerConfig.from_preset(
        preset,
        **dict(qk_norm=True, qkv_bias=True) | overrides,
        hidden_size=D,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=N,
        backend="triton",
    )
    mixer = TimeMixer(config, is_first)
    init_mixer(mixer, 1, 3, "published")
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    reference = copy.deepcopy(mixer).double().to(DEVICE)
    reference.mixer_config = config.replace(backend="chunked")
    return mixer.to(DEVICE), reference


def rope_of(N, T, batch=1):
    angle = torch.arange(T)[:, None] / 100 ** (torch.arange(N // 2) / (N // 2)) + torch.arange(batch)[:, None, None]
    angle = torch.cat([angle, angle], -1)
    return angle.cos().to(DEVICE), angle.sin().to(DEVICE)


def first_for(mixer, B, T, heads=None):
    """What the first layer would hand on, at as many heads."""
    c = mixer.mixer_config
    if mixer.is_first:
        return None
    torch.manual_seed(7)
    heads = heads or (c.num_heads if c.value_path == "residual_full" else c.num_kv_heads)
    v, k = (torch.randn(B, T, count, c.head_size, device=DEVICE) for count in (heads, c.num_kv_heads))
    return FirstLayerKV(v, k if c.key_residual else None)


def results(mixer, x, first, rope, dtype, **options):
    """Outputs and gradients by name; the reference gets everything in float64."""

    def leaf(value):
        return None if value is None else value.to(dtype).detach().requires_grad_()

    x, first = leaf(x), None if first is None else FirstLayerKV(*map(leaf, first))
    rope = None if rope is None else tuple(part.to(dtype) for part in rope)
    y, handed, state = mixer(x, first=first, rope=rope, **options)
    out = {"y": y, "state": state.wkv}
    if mixer.is_first:
        heads = mixer.mixer_config.num_heads  # PyTorch hands on H of them for some presets, the fused mixer always G
        out |= {"v_first": handed.v.repeat_interleave(heads // handed.v.shape[2], 2), "k_first": handed.k}
    out = {name: value for name, value in out.items() if value is not None}
    torch.manual_seed(3)
    weights = {name: torch.randn(value.shape, dtype=torch.float64).to(DEVICE) for name, value in out.items()}
    total = sum((value.to(weights[name].dtype) * weights[name]).sum() for name, value in out.items())
    leaves = dict(mixer.named_parameters()) | {"x": x}
    if first is not None:
        leaves |= {f"first.{name}": value for name, value in first._asdict().items() if value is not None}
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {name: value.detach() for name, value in out.items()} | {
        f"d{name}": grad for name, grad in zip(leaves, grads, strict=True) if grad is not None
    }


def distances(found, wanted):
    assert found.keys() == wanted.keys()
    return {
        name: ((found[name].double() - x).norm() / x.norm().clamp(min=1e-30)).item()
        for name, x in wanted.items()
        if x.norm() > 0 or found[name].norm() > 0
    }


def assert_close(found, wanted):
    measured = distances(found, wanted)
    too_far = {name: x for name, x in measured.items() if not x <= CLOSE}
    assert not too_far, f"too far: {too_far}; all: {measured}"


def compare(mixer, reference, x, first, rope, **options):
    assert fused_mixer.is_fused_sequence(mixer.mixer_config, x) and not fused_mixer.is_fused_sequence(
        reference.mixer_config, x.double()
    )
    found = results(mixer, x, first, rope, torch.float32, **options)
    assert_close(found, results(reference, x, first, rope, torch.float64, **options))


def tokens(B, T):
    torch.manual_seed(1)
    return torch.randn(B, T, D, device=DEVICE)


@pytest.mark.usefixtures("no_recurrence")
@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("is_first, kv_heads", [(True, 4), (False, 2)], ids=["first-MHA", "later-GQA"])
def test_every_preset(preset, is_first, kv_heads):
    mixer, reference = make(preset, kv_heads=kv_heads, is_first=is_first)
    compare(mixer, reference, tokens(2, T), first_for(mixer, 2, T), rope_of(16, T))


@pytest.mark.usefixtures("no_recurrence")
@pytest.mark.parametrize(
    "preset, N, T",
    [
        *(("cxa079", 8, 3), ("cxa079", 40, 11), ("cxa079", 64, 19), ("cxa079", 128, 9), ("cxa079", 256, 3)),
        *(("cxa078", 16, 35), ("cxa078", 64, 3), ("cxa078", 128, 19), ("cxa078", 256, 3)),
    ],
)
def test_every_head_size_and_ragged_lengths(preset, N, T):
    mixer, reference = make(preset, N=N)
    compare(mixer, reference, tokens(1, T), first_for(mixer, 1, T), rope_of(N, T))


@pytest.mark.usefixtures("no_recurrence")
@pytest.mark.parametrize(
    "rope, qk_norm, key_scale",  # every two of them together
    [
        *((True, True, "log"), (True, False, "decay"), (True, False, "k_a")),
        *((False, True, "decay"), (False, True, "k_a"), (False, False, "log")),
    ],
)
def test_what_may_be_absent(rope, qk_norm, key_scale):
    mixer, reference = make("cxa079", rope=rope, qk_norm=qk_norm, key_scale=key_scale)
    compare(mixer, reference, tokens(2, 17), first_for(mixer, 2, 17), rope_of(16, 17, batch=2) if rope else None)


@pytest.mark.usefixtures("no_recurrence")
@pytest.mark.parametrize("norm_over, rotated", [("heads", 16), ("heads", 8), ("head", 12)])
def test_norms_over_all_heads_and_rotations_of_a_part(norm_over, rotated):
    mixer, reference = make("cxa079", norm_over=norm_over)
    compare(mixer, reference, tokens(2, 17), first_for(mixer, 2, 17), rope_of(rotated, 17))


@pytest.mark.usefixtures("no_recurrence")
@pytest.mark.parametrize("heads, kv_heads", [(7, 1), (6, 2), (1, 1)])
def test_groups_of_any_size(heads, kv_heads):
    mixer, reference = make("cxa079", heads=heads, kv_heads=kv_heads)
    compare(mixer, reference, tokens(1, 33), first_for(mixer, 1, 33), rope_of(16, 33))


@pytest.mark.usefixtures("no_recurrence")
@pytest.mark.parametrize("preset", ["cxa078", "rad"])
@pytest.mark.parametrize("heads", [2, 4], ids=["shared", "own"])
def test_v_first_at_the_heads_of_either_path(preset, heads):
    """A first layer in PyTorch hands on H heads, a fused one G."""
    mixer, reference = make(preset)
    compare(mixer, reference, tokens(2, 9), first_for(mixer, 2, 9, heads), rope_of(16, 9))


@pytest.mark.usefixtures("no_recurrence")
def test_detached_first_layers_get_no_gradient():
    mixer, reference = make("cxa079", detach_first=True)
    x, first, rope = tokens(1, 9), first_for(mixer, 1, 9), rope_of(16, 9)
    compare(mixer, reference, x, first, rope)
    assert "dfirst.v" not in results(mixer, x, first, rope, torch.float32)


@pytest.mark.usefixtures("no_recurrence")
def test_a_key_of_zeros_has_a_gradient():
    mixer, reference = make("hxa07c", qkv_bias=False, qk_norm=False)
    x = tokens(1, 9)
    x[:, 3] = 0
    compare(mixer, reference, x, None if mixer.is_first else first_for(mixer, 1, 9), rope_of(16, 9))


@pytest.mark.parametrize("preset", ["cxa079", "hxa07c", "cxa078", "x070"])
def test_with_the_recurrence(preset):
    mixer, reference = make(preset, kv_heads=4 if preset == "x070" else 2)
    state = MixerState(torch.randn(2, 4, 16, 16, device=DEVICE), None)
    if preset == "x070":
        state = state._replace(shift=torch.randn(2, D, device=DEVICE))
    compare(mixer, reference, tokens(2, 20), first_for(mixer, 2, 20), rope_of(16, 20), state=state)


@pytest.mark.usefixtures("no_recurrence")
@pytest.mark.parametrize(
    "preset, is_first, window_mix",
    [("cxa079", True, "sum"), ("cxa079", False, "sum"), *((preset, False, "softmax") for preset in sorted(PRESETS))],
)
def test_windows(preset, is_first, window_mix):
    mixer, reference = make(preset, is_first=is_first, window=6, sinks=2, window_mix=window_mix)
    compare(mixer, reference, tokens(2, T), first_for(mixer, 2, T), rope_of(16, T))


@pytest.mark.parametrize("preset", ["cxa079", "rad", "x070"])
def test_windows_continue(preset):
    """From a prompt by the fused path, in chunks and by single tokens."""
    mixer, reference = make(preset, is_first=True, window=6, sinks=2, window_mix="softmax")
    x, (cos, sin) = tokens(2, 20), rope_of(16, 20)
    mask = torch.ones(2, 20, dtype=torch.bool, device=DEVICE)
    mask[0, :3] = False
    whole, *_ = reference(x.double(), first=None, rope=(cos.double(), sin.double()), mask=mask)
    state, parts = None, []
    with torch.no_grad():
        for t, end in ((0, 11), (11, 17), (17, 18), (18, 19), (19, 20)):
            rope = cos[:, t:end], sin[:, t:end]
            y, _, state = mixer(x[:, t:end], first=None, rope=rope, mask=mask[:, t:end], state=state, inplace=t > 0)
            parts.append(y)
    assert_close({"y": torch.cat(parts, 1)}, {"y": whole.detach()})


@pytest.mark.parametrize(
    "preset, is_first, window",
    [("cxa079", True, {}), ("cxa079", False, WINDOWED), ("rad", False, {}), ("x070", True, {})],
)
def test_what_is_computed_again_is_the_same(preset, is_first, window):
    """From a state, of which the recurrence begins both times."""
    mixer, _ = make(preset, is_first=is_first, **window)
    x, first, rope = tokens(1, 17), first_for(mixer, 1, 17), rope_of(16, 17)
    state = mixer(x, first=first, rope=rope)[2].map(torch.Tensor.detach)
    kept, again = (
        results(mixer, x, first, rope, torch.float32, state=state, recompute=recompute) for recompute in (False, True)
    )
    assert kept.keys() == again.keys() and all(torch.equal(value, again[name]) for name, value in kept.items())


@pytest.mark.parametrize("preset, window", [("cxa079", {}), ("x070", {}), ("cxa079", WINDOWED)])
def test_masks_and_packed_documents(preset, window):
    mixer, reference = make(preset, **window)
    x, first, rope = tokens(2, 20), first_for(mixer, 2, 20), rope_of(16, 20, batch=2)
    mask = torch.ones(2, 20, dtype=torch.bool, device=DEVICE)
    mask[0, :3] = mask[1, 15:] = False
    compare(mixer, reference, x, first, rope, mask=mask)
    bounds = torch.tensor([0, 7, 20, 33, 40], dtype=torch.int32, device=DEVICE)
    compare(mixer, reference, x, first, rope, cu_seqlens=bounds)


@pytest.mark.parametrize("preset", ["cxa079", "hxa07b", "rad"])
@pytest.mark.parametrize("is_first, window", [(True, {}), (False, WINDOWED)], ids=["first", "window"])
@pytest.mark.usefixtures("no_recurrence")
def test_bf16_is_no_further_off_than_pytorch(preset, is_first, window):
    mixer, reference = make(preset, is_first=is_first, **window)
    x, first, rope = tokens(2, T), first_for(mixer, 2, T), rope_of(16, T)
    exact = results(reference, x, first, rope, torch.float64)
    plain = copy.deepcopy(mixer)
    plain.mixer_config = mixer.mixer_config.replace(backend="chunked")
    with torch.autocast(DEVICE, torch.bfloat16):
        found = distances(results(mixer, x, first, rope, torch.float32), exact)
        allowed = distances(results(plain, x, first, rope, torch.float32), exact)
    factor = 2 if window else 1.5  # the gradients of r and k from recurrence and window add up in bf16, there in fp32
    too_far = {name: (x, allowed[name]) for name, x in found.items() if not x <= factor * allowed[name]}
    assert not too_far


def test_packed_bf16_rows_with_the_recurrence():
    """All of it as a student trains: what bf16 costs, with and without the fused ops."""
    mixer, reference = make("cxa079", N=64)
    x, first, rope = tokens(2, 20), first_for(mixer, 2, 20), rope_of(64, 20)
    bounds = torch.tensor([0, 7, 20, 40], dtype=torch.int32, device=DEVICE)
    exact = results(reference, x, first, rope, torch.float64, cu_seqlens=bounds)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = distances(results(mixer, x, first, rope, torch.float32, cu_seqlens=bounds), exact)
    assert max(found.values()) < 0.03, found


def test_dtypes_under_autocast(monkeypatch):
    """bf16 products make bf16 inputs of the recurrence, whatever the residual stream and the rotation are."""
    seen = {}

    def look(*tensors, **options):
        seen.update(zip("rwkvab", (x.dtype for x in tensors), strict=False))
        return stand_in(*tensors, **options)

    monkeypatch.setattr(time_mixer, "wkv7", look)
    mixer, _ = make("cxa079")
    with torch.autocast(DEVICE, torch.bfloat16):
        y, *_ = mixer(tokens(1, 5), first=first_for(mixer, 1, 5), rope=rope_of(16, 5))
    assert seen == dict.fromkeys("rkvab", torch.bfloat16) | {"w": torch.float32} and y.dtype == torch.bfloat16
    mixer(tokens(1, 5), first=first_for(mixer, 1, 5), rope=rope_of(16, 5))
    assert set(seen.values()) == {torch.float32}


@pytest.mark.usefixtures("no_recurrence")
def test_strided_projections_are_not_copied():
    """Slices of one wide product give what contiguous projections give."""
    torch.manual_seed(0)
    B, T, H, G, N = 2, 9, 4, 2, 16
    wide = torch.randn(B, T, (H + 2 * G) * N + 16, device=DEVICE)
    *heads, decay, iclr = wide.split([H * N, G * N, G * N, 8, 8], -1)
    heads = [x.unflatten(-1, (-1, N)) for x in heads]
    ups = torch.randn(2, 8, H * N, device=DEVICE)
    bias = torch.randn(2, H * N, device=DEVICE)
    options = {"w0": bias[0], "a0": bias[1], "key_scale": "decay"}
    found = ops.inputs(*heads, (decay, ups[0]), (iclr, ups[1]), **options)
    copies = [x.contiguous() for x in (*heads, decay, iclr)]
    wanted = ops.inputs(*copies[:3], (copies[3], ups[0]), (copies[4], ups[1]), **options)
    for x, y in zip(found, wanted, strict=True):
        assert x is y is None or torch.equal(x, y)
    r, k, v = heads
    [launch], _ = ops.plan_inputs(dict(r=r, k=k, v=v, decay=r, iclr=r, w0=bias[0], a0=bias[1]), key_scale="decay")
    assert launch.args["k_"].data_ptr() == k.data_ptr()


@pytest.mark.parametrize("key_scale", ["decay", "k_a"])
def test_how_the_work_is_cut_changes_no_gradient(key_scale):
    """Programs of one block and of several, and tokens that fill neither blocks nor programs."""
    torch.manual_seed(0)
    B, T, H, G, N = 1, 21, 4, 2, 64
    heads = dict(r=H, k=G, v=G, decay=H, iclr=H, key_gate=G, k_first=G, value_gate=H, v_first=G)
    given = {name: torch.randn(B, T, count, N, device=DEVICE) for name, count in heads.items()}
    counts = dict(w0=H, a0=H, k0=G, v0=H, r_k=H) | (dict(k_k=H, k_a=H) if key_scale == "k_a" else {})
    given |= {name: torch.randn(1, T, N, device=DEVICE) for name in ("cos", "sin")}
    given |= {name: torch.randn(N, device=DEVICE) for name in ("r_norm", "k_norm")}
    given |= {name: torch.randn(count * N, device=DEVICE) for name, count in counts.items()}
    _, grads = ops.plan_inputs(given, key_scale=key_scale)
    grads = {name: torch.randn_like(x) for name, x in grads.items()}

    def gradients(work):
        how = dict(key_scale=key_scale, wanted={"k_first", "v_first"}, work=work)
        [launch], out, sums, _ = ops.plan_inputs_backward(given, grads, **how)
        sums.fill_(float("nan"))
        launch.run()
        assert len(sums) == -(-T // (launch.constants["BLOCK"] * launch.constants["BLOCKS"]))
        return launch.constants["BLOCK"], launch.constants["BLOCKS"], out, sums.sum(0)

    *first, wanted, total = gradients(ops.Work(tokens=2, warps=1))
    assert first == [2, 1]
    for work, cut in {ops.Work(10, 1): [2, 5], ops.Work(16, 4): [8, 2], ops.Work(32, 8): [16, 2]}.items():
        *found, out, sums = gradients(work)
        assert found == cut and out.keys() == wanted.keys()
        assert_close(out, wanted)
        assert_close({"sums": sums}, {"sums": total})


def test_one_token_without_gradient_is_another_kernel():
    mixer, _ = make("cxa079", is_first=True)
    assert fused_mixer.is_fused_sequence(mixer.mixer_config, tokens(1, 1))
    with torch.no_grad():
        assert not fused_mixer.is_fused_sequence(mixer.mixer_config, tokens(1, 1))
        assert fused_mixer.is_fused_sequence(mixer.mixer_config, tokens(1, 2))


def test_the_ops_are_registered_as_torch_wants_them():
    torch.manual_seed(0)
    B, T, H, N = 1, 3, 2, 16

    def leaf(*shape):
        return torch.randn(*shape, device=DEVICE, requires_grad=True)

    names = "r k v w0 a0 r_k decay decay_up iclr iclr_up"
    tensors = [*(leaf(B, T, H, N) for _ in range(3)), leaf(H * N), leaf(H * N), leaf(H, N)]
    tensors += [leaf(B, T, 8), leaf(8, H * N)] * 2
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ops._inputs, (tensors, names, "log", 1e-6, True), test_utils=checks)
    gate, bonus = (leaf(B, T, 8), leaf(8, H * N)), leaf(B, T, H)
    mixed = ops.Mixed(leaf(B, T, H, N), leaf(B, T, H, 1), leaf(H, N), leaf(H, N))
    for window in ((None,) * 4, mixed):
        given = leaf(B, T, H, N), *gate, bonus, leaf(B, T, H, N), *window, 0.25
        torch.library.opcheck(ops._output, given, test_utils=checks)
