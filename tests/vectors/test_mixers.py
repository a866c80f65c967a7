"""What every mixer promises, over the whole registry; and parity with public code or definitions."""

import pytest
import torch

from rwkvinside.errors import UserError
from rwkvinside.vectors.mixers.base import Place, Shared
from rwkvinside.vectors.mixers.mixture import Mixture
from rwkvinside.vectors.mixers.registry import MIXERS, build_mixer, layer_options, mixer_class, parse_pattern
from rwkvinside.vectors.mixers.retnet import RetNet

D, T, B = 32, 11, 3
SMALL = {
    "rwkv7": {"head_size": 16},
    "mamba2": {"d_state": 8, "head_size": 16},
    "hyena": {"l_max": 80, "filter_width": 16},
    "retnet": {"heads": 2},
    "s4": {"d_state": 8},
    "attention": {"heads": 2},
    "linformer": {"heads": 2, "k": 4, "max_len": 16},
    "performer": {"heads": 2, "features": 24},
    "gpt2": {"heads": 2, "max_len": 80},
}
VARIANTS = {
    "attention window": ("attention", {"heads": 2, "window": 3}),
    "attention top_k": ("attention", {"heads": 2, "top_k": 2}),
    "hyena order 3": ("hyena", {"l_max": 80, "order": 3, "filter_width": 16}),
    "s4 legs": ("s4", {"d_state": 8, "init": "legs"}),
    "hyena reach": ("hyena", {"l_max": 80, "filter_width": 16, "reach": 0.05}),
    "gru|attention": ("gru|attention", {"heads": 2}),
    "mamba2 groups": ("mamba2", {"d_state": 8, "head_size": 8, "groups": 2}),
    **{kind: (kind, SMALL.get(kind, {})) for kind in MIXERS},
}
CAUSAL = [name for name in VARIANTS if name != "linformer"]
FFT = ("hyena", "hyena order 3", "hyena reach", "s4", "s4 legs")


def make(name, dtype=torch.float64, **more):
    kind, options = VARIANTS[name]
    if kind == "gru|attention":
        mixer = Mixture([build_mixer("gru", D), build_mixer("attention", D, **options)], D)
    else:
        mixer = build_mixer(kind, D, Place(0, 2, True), **options, **more)
    mixer = mixer.to(dtype).eval()
    with torch.no_grad():
        for parameter in mixer.parameters():  # low-rank maps start at 0, which would hide what reaches them
            parameter.add_(0.05 * torch.randn_like(parameter))
    return mixer


def inputs(dtype=torch.float64, length=T):
    return torch.randn(B, length, D, dtype=dtype)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("cuts", [(1, 4, 9), tuple(range(1, 11))], ids=["chunks", "tokens"])
def test_chunks_equal_the_whole(name, cuts):
    mixer, x = make(name), inputs()
    whole, end = mixer(x)
    state, parts = None, []
    for start, stop in zip((0, *cuts), (*cuts, T), strict=True):
        y, state = mixer(x[:, start:stop], state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)
    for a, b in zip(state, end, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["mamba2", "retnet", "performer", "rwkv7"])
def test_long_rows_equal_their_halves(name):
    mixer, x = make(name), inputs(length=150)
    whole, _ = mixer(x)
    _, state = mixer(x[:, :75])
    torch.testing.assert_close(mixer(x[:, 75:], state)[0], whole[:, 75:], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", CAUSAL)
def test_nothing_looks_ahead(name):
    mixer, x = make(name, torch.float32), inputs(torch.float32)
    changed = x.clone()
    changed[:, 6:] = torch.randn(B, T - 6, D)
    leak = (mixer(x)[0] - mixer(changed)[0])[:, :6].abs().max()
    assert leak <= (1e-6 if name in FFT else 0)
    assert (mixer(x)[0] - mixer(changed)[0])[:, 6:].abs().max() > 1e-3


@pytest.mark.parametrize("kind, options", [("linformer", SMALL["linformer"]), ("gru", {"bidirectional": True})])
def test_what_looks_ahead_says_so(kind, options):
    mixer, x = build_mixer(kind, D, **options), inputs(torch.float32)
    changed = x.clone()
    changed[:, -1] += 1
    assert not mixer.causal
    assert (mixer(x)[0] - mixer(changed)[0])[:, 0].abs().max() > 1e-4
    assert mixer(x)[1] is None
    with pytest.raises(ValueError, match="looks ahead"):
        mixer(x, (x,))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_gets_a_gradient(name):
    mixer = make(name)
    y, state = mixer(inputs())
    y.pow(2).sum().backward()
    for parameter_name, parameter in mixer.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("name", VARIANTS)
def test_padding_changes_nothing(name):
    """Rows of 3, 5 and 8 tokens, padded on the left, on the right and between; and a state that goes on from them."""
    mixer = make(name)
    masks = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 0], [1, 0, 1, 0, 1, 0, 1, 1], [1] * 8], dtype=torch.bool)
    x, more = inputs(length=8), inputs(length=2)
    y, state = mixer(x, mask=masks)
    for row, mask in enumerate(masks):
        alone, end = mixer(x[row : row + 1, mask])
        torch.testing.assert_close(y[row : row + 1, mask], alone, rtol=0, atol=1e-10)
        assert y[row, ~mask].abs().sum() == 0
        if mixer.causal:
            after = mixer(more, state)[0][row : row + 1]
            torch.testing.assert_close(after, mixer(more[row : row + 1], end)[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_row_of_padding_keeps_its_state(name):
    mixer, x, more = make(name), inputs(), inputs(length=2)
    _, state = mixer(x)
    none = torch.zeros(B, 2, dtype=torch.bool)
    none[0] = True
    _, after = mixer(more, state, mask=none)
    torch.testing.assert_close(mixer(more, after)[0][1:], mixer(more, state)[0][1:], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", CAUSAL)
def test_state_is_reordered_by_row(name):
    mixer, x, more = make(name), inputs(), inputs(length=2)
    _, state = mixer(x)
    order = torch.tensor([2, 0, 0])
    picked = tuple(part[order] for part in state)
    torch.testing.assert_close(mixer(more[order], picked)[0], mixer(more, state)[0][order], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", CAUSAL)
def test_state_is_fp32_and_constant_where_it_says_so(name):
    mixer = make(name, torch.float32).to(torch.bfloat16)
    sizes = []
    for length in (4, 16):
        _, state = mixer(inputs(torch.bfloat16, length))
        assert all(part.dtype == torch.float32 for part in state if part.is_floating_point())
        sizes.append(sum(part.numel() * part.element_size() for part in state))
    assert (sizes[0] == sizes[1]) == mixer.recurrent


def test_mamba2_is_that_of_transformers():
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        hidden_size=D, state_size=8, expand=2, head_dim=16, num_heads=4, n_groups=2, chunk_size=4, use_bias=False
    )
    torch.manual_seed(1)
    theirs = Mamba2Mixer(config, layer_idx=0).eval()
    ours = build_mixer("mamba2", D, d_state=8, head_size=16, groups=2)
    weights = theirs.state_dict()
    weights["dt_bias"] = torch.randn_like(weights["dt_bias"])
    theirs.load_state_dict(weights)
    ours.load_state_dict(weights)
    x = inputs(torch.float32)
    torch.testing.assert_close(ours(x)[0], theirs(x), rtol=0, atol=1e-5)


def test_retention_is_its_closed_form():
    mixer, x = make("retnet"), inputs()
    assert isinstance(mixer, RetNet)
    seen = {}
    mixer.output.register_forward_pre_hook(lambda module, args: seen.update(y=args[0]))
    mixer(x)
    from rwkvinside.modeling.time_mixer import rotate
    from rwkvinside.vectors.mixers.attention import rotation

    N = mixer.head_size
    cos, sin = rotation(torch.arange(T)[None], N, x.dtype)
    q, k, v = (f(x).unflatten(-1, (2, N)) for f in (mixer.query, mixer.key, mixer.value))
    q, k = rotate(q, cos, sin), rotate(k, cos, sin) * N**-0.5
    n = torch.arange(T)
    gamma = 1 - 2.0 ** (-5 - torch.arange(2, dtype=torch.float64))
    decay = torch.where(n[:, None] >= n, gamma[:, None, None] ** (n[:, None] - n).clamp(min=0), 0.0)
    y = torch.einsum("bihn,bjhn,hij,bjhp->bihp", q, k, decay, v)
    y = torch.nn.functional.layer_norm(y, (N,)).flatten(2) * torch.nn.functional.silu(mixer.gate(x))
    torch.testing.assert_close(seen["y"], y, rtol=0, atol=1e-10)


@pytest.mark.parametrize("init", ["lin", "inv", "legs", "random"])
def test_s4_convolution_is_its_recurrence(init):
    mixer = build_mixer("s4", D, d_state=8, init=init).double()
    x, seen = inputs(), {}
    mixer.output.register_forward_pre_hook(lambda module, args: seen.update(y=args[0]))
    mixer(x)
    torch.testing.assert_close(seen["y"], torch.nn.functional.gelu(recurrence(x, mixer)), rtol=0, atol=1e-10)


def recurrence(u, mixer):
    """y (B, T, D) of an S4 before its output layer, token by token, for u (B, T, D): its definition."""
    a = torch.complex(-mixer.log_a.exp(), mixer.a_imag)
    dt_a = a * mixer.log_dt.exp()[:, None]
    c = torch.view_as_complex(mixer.C) * (dt_a.exp() - 1) / a
    h = torch.zeros(len(u), *a.shape, dtype=dt_a.dtype)
    outputs = []
    for t in range(u.shape[1]):
        h = h * dt_a.exp() + u[:, t, :, None]
        outputs.append(2 * (h * c).sum(-1).real + u[:, t] * mixer.D)
    return torch.stack(outputs, 1)


def test_performer_estimates_softmax():
    x, seen, errors = inputs(), {}, []
    for features in (64, 16384):
        mixer = build_mixer("performer", D, heads=2, features=features).double()
        mixer.output.register_forward_pre_hook(lambda module, args: seen.update(y=args[0]))
        mixer(x)
        errors.append(_distance_to_softmax(mixer, x, seen["y"]))
    assert errors[1] < 0.25 and errors[1] < errors[0] / 2, errors


def _distance_to_softmax(mixer, x, y):
    q, k, v = (f(x).unflatten(-1, (2, 16)).transpose(1, 2) for f in (mixer.query, mixer.key, mixer.value))
    q, k = (torch.nn.functional.rms_norm(part, (16,)) for part in (q, k))
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    return ((y - exact).norm() / exact.norm()).item()


def test_tmd_moves_what_listens_to_it():
    x, tmd = inputs(), torch.randn(B, 16, dtype=torch.float64)
    for kind in (kind for kind in MIXERS if mixer_class(kind).takes_codes):
        mixer = make(kind, d_tmd=16)
        assert (mixer(x, shared=Shared(tmd=tmd))[0] - mixer(x)[0]).abs().max() > 1e-4


def test_mixture_begins_as_its_first_mixer_and_is_routed_by_codes():
    gru, attention = (build_mixer(kind, D) for kind in ("gru", "attention"))
    mixer, x = Mixture([gru, attention], D, d_tmd=16), inputs(torch.float32)
    torch.testing.assert_close(mixer.weights(), torch.tensor([0.9526, 0.0474]), rtol=0, atol=1e-4)
    torch.testing.assert_close(mixer(x)[0], 0.95257 * gru(x)[0] + 0.04743 * attention(x)[0], rtol=0, atol=1e-4)
    torch.nn.init.normal_(mixer.tmd_route.weight)
    tmd = torch.randn(B, 16)
    weights = mixer.weights(tmd)
    expected = weights[:, :1, None] * gru(x)[0] + weights[:, 1:, None] * attention(x)[0]
    torch.testing.assert_close(mixer(x, shared=Shared(tmd=tmd))[0], expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="whole stack"):
        Mixture([gru, build_mixer("gpt2", D)], D)


def test_rwkv7_has_as_many_heads_as_fit():
    config = build_mixer("rwkv7", D, head_size=8).time_mixer.mixer_config
    assert (config.num_heads, config.head_size) == (4, 8)


def test_names_and_options_are_checked():
    with pytest.raises(UserError, match="did you mean mamba2"):
        build_mixer("mamba", D)
    with pytest.raises(UserError, match=r"model\.options\.s4\.states is not known"):
        build_mixer("s4", D, states=3)
    with pytest.raises(UserError, match="heads=5 does not divide d_model=32"):
        build_mixer("attention", D, heads=5)
    with pytest.raises(UserError, match="k=64 with max_len=16"):
        build_mixer("linformer", D, k=64, max_len=16)
    with pytest.raises(ValueError, match="l_max=4"):
        build_mixer("hyena", D, l_max=4)(inputs(torch.float32))
    assert parse_pattern("mamba2*2,attention", 5) == ["mamba2", "mamba2", "attention", "mamba2", "mamba2"]
    assert parse_pattern("mamba2|attention*2,gru", 4) == ["mamba2|attention", "mamba2|attention", "gru"] + [
        "mamba2|attention"
    ]
    for wrong in ("mamba2*,attention", "mamba2|", "|gru"):
        with pytest.raises(UserError, match=r"model\.pattern"):
            parse_pattern(wrong, 5)
    assert layer_options({"d_state": [16, 64], "expand": 2}, 3) == {"d_state": 64, "expand": 2}
