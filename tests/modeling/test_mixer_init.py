"""The start of mixers that copy nothing, and the parts of a mixer that only such models have."""

import math

import pytest
import torch
from transformers import LlamaConfig

from rwkvinside.modeling.first_layer import FirstLayerKV
from rwkvinside.modeling.hybrid_llama import HybridLlamaConfig, HybridLlamaForCausalLM
from rwkvinside.modeling.mixer_presets import TimeMixerConfig
from rwkvinside.modeling.time_mixer import DECAY_SCALE, TimeMixer
from rwkvinside.teacher.fresh import fresh_model

D, H, N, LAYERS = 48, 3, 16, 4


def mixer(preset="x070", layer=1, is_first=False, init="scratch", shift_ratio=1.0, **changes):
    torch.manual_seed(0)
    sizes = dict(hidden_size=D, num_heads=H, num_kv_heads=H, head_size=N)
    config = TimeMixerConfig.from_preset(preset, qk_norm=False, **sizes | changes)
    return TimeMixer(config, is_first, layer=layer, num_layers=LAYERS, init=init, shift_ratio=shift_ratio)


@pytest.mark.parametrize("preset", ["x070", "cxa079"])
def test_projections_are_orthogonal_and_the_output_nothing(preset):
    made = mixer(preset)
    for name, gain in (("receptance", 1.0), ("key", 0.1), ("value", 1.0)):
        weight = getattr(made, name).weight
        torch.testing.assert_close(weight @ weight.T, gain**2 * torch.eye(D), atol=1e-5, rtol=0)
    assert not made.output.weight.any()
    x = torch.randn(2, 5, D)
    first = FirstLayerKV(torch.randn(2, 5, H, N), torch.randn(2, 5, H, N) if preset == "cxa079" else None)
    rope = None if preset == "x070" else (torch.ones(1, 5, N), torch.zeros(1, 5, N))
    assert not made(x, first=first, rope=rope)[0].any()


def test_decay_is_a_ramp_by_channel_and_depth():
    """Slow channels first, the more the deeper; as published for RWKV-7, whose last channel is at 0.5 + 2.5."""
    for layer in range(LAYERS):
        w0 = mixer(layer=layer).w0.detach().flatten()
        assert w0[0] == pytest.approx(-6 + 0.5 - 2.5) and w0[-1] == pytest.approx(0.5 + 2.5)
        exponent = 1 + (layer / (LAYERS - 1)) ** 0.3
        middle = torch.arange(H * N)[N // 2 :: N] / (H * N - 1)  # channels around which the zigzag is 0
        zigzag = 2.5 * (0.5 / ((N - 1) / 2)) ** 2
        torch.testing.assert_close(w0[N // 2 :: N], -6 + 6 * middle**exponent + 0.5 + zigzag)
    decay = torch.exp(-DECAY_SCALE * torch.sigmoid(mixer(layer=3).w0)).flatten()
    assert decay[0] > 0.999 and decay[-1] < 0.6


def test_token_shift_falls_with_the_channel_and_the_depth():
    first, last = mixer(layer=0), mixer(layer=LAYERS - 1)
    for name, exponent in (("x_r", 0.2), ("x_w", 0.9), ("x_k", 0.7), ("x_v", 0.7), ("x_a", 0.9), ("x_g", 0.2)):
        shift = getattr(first, name).flatten()
        assert shift[0] == 1 and (shift.diff() < 0).all() and shift[-1] < 0.05
        torch.testing.assert_close(shift[12], torch.tensor(1 - 0.25**exponent))
        assert (getattr(last, name).flatten()[1:] < shift[1:]).all()
    half = mixer(layer=0, shift_ratio=0.5)
    torch.testing.assert_close(half.x_k, first.x_k / 2)
    assert not mixer(layer=0, shift_ratio=0.0).x_k.any()


def test_the_other_constants_are_the_published_ones():
    made = mixer(layer=1)
    ramp = torch.arange(H * N) / (H * N - 1) - 0.5
    torch.testing.assert_close(made.v0.flatten(), 0.73 - 0.4 * ramp)
    torch.testing.assert_close(made.k_k.flatten(), 0.71 - 0.1 * ramp)
    assert (made.k_a == torch.tensor(1.02)).all() and (made.r_k == torch.tensor(-0.04)).all()
    torch.testing.assert_close(made.ln_x.weight, torch.full((H * N,), (2 / LAYERS) ** 0.7))
    for name in ("w1", "a1", "v1", "g1"):
        assert not getattr(made, name).any()


def test_everything_learns_once_the_output_does():
    """Nothing is stuck: with an output that is not 0 and down-maps that are not, every parameter has a gradient."""
    for preset in ("x070", "cxa079"):
        made = mixer(preset)
        with torch.no_grad():
            for name in ("w1", "a1", "v1", "g1", "k1"):
                if hasattr(made, name):
                    getattr(made, name).normal_()
            made.output.weight.normal_()
        first = FirstLayerKV(torch.randn(1, 7, H, N), torch.randn(1, 7, H, N) if preset == "cxa079" else None)
        rope = None if preset == "x070" else (torch.ones(1, 7, N), torch.zeros(1, 7, N))
        made(torch.randn(1, 7, D), first=first, rope=rope)[0].square().sum().backward()
        for name, parameter in made.named_parameters():
            assert parameter.grad is not None and parameter.grad.any(), (preset, name)


def test_linear_attention_is_a_sum_over_the_past():
    made = mixer(is_first=True, linear_attention=True)
    assert not any(name in dict(made.named_parameters()) for name in ("w0", "a0", "k_a", "x_w", "x_a"))
    x = torch.randn(1, 9, D)
    with torch.no_grad():
        made.output.weight.copy_(torch.eye(D))
        projected, _, _ = made.project_inputs(x, first=None)
        y, _, state = made(x, first=None)
        r, k, v = projected.r, projected.k, projected.v
        scores = torch.einsum("bthn,bshn->bhts", r, k).tril()
        want = torch.einsum("bhts,bshn->bthn", scores, v)
        want = made.ln_x(want.flatten(0, 1).flatten(1)).view_as(want)
        want = (want + (r * k * made.r_k).sum(-1, keepdim=True) * v) * projected.gate
        torch.testing.assert_close(y, want.flatten(2), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(state.wkv, torch.einsum("bthv,bthk->bhvk", v, k), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="needs group_norm"):
        mixer("cxa079", linear_attention=True)


def test_linear_attention_shares_keys_and_values_among_heads():
    made, every = (mixer(is_first=True, linear_attention=True, num_kv_heads=heads) for heads in (1, H))
    made.output.weight.data.normal_()
    own = made.state_dict()
    for name in ("key.weight", "value.weight"):
        own[name] = own[name].repeat(H, 1)
    every.load_state_dict(own)
    x = torch.randn(2, 8, D)
    with torch.no_grad():
        y = made(x, first=None)[0]
        torch.testing.assert_close(y, every(x, first=None)[0])
    assert y.abs().mean() > 0.01


def test_linear_attention_continues_from_its_state():
    made = mixer(is_first=True, linear_attention=True).eval()
    made.output.weight.data.normal_()
    x = torch.randn(2, 8, D)
    with torch.no_grad():
        whole, _, _ = made(x, first=None)
        part, _, state = made(x[:, :5], first=None)
        tail = [made(x[:, 5:6], first=None, state=state)]
        tail += [made(x[:, 6:], first=None, state=tail[0][2])]
    torch.testing.assert_close(torch.cat([part, *(y for y, _, _ in tail)], 1), whole, atol=1e-5, rtol=1e-4)


def test_the_scale_is_of_what_the_output_reads():
    usual, doubled = mixer(is_first=True), mixer(is_first=True, output_scale=2.0)
    for made in (usual, doubled):
        torch.manual_seed(1)
        made.output.weight.data.normal_()
    x = torch.randn(1, 6, D)
    torch.testing.assert_close(doubled(x, first=None)[0], 2 * usual(x, first=None)[0])


def shapes(**changes):
    fields = dict(vocab_size=96, hidden_size=D, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=H)
    return fields | dict(num_key_value_heads=H, head_dim=N, tie_word_embeddings=False) | changes


def test_a_new_hybrid_of_transformers_begins_from_scratch():
    """The class alone, without this package's training: its mixers begin as a model from nothing does, not at NaN."""
    torch.manual_seed(0)
    fields = mixer().mixer_config.to_dict()
    model = HybridLlamaForCausalLM(HybridLlamaConfig(**shapes(), rwkv_layers=[0, 2], mixer=fields))
    attention = model.model.layers[2].self_attn
    torch.testing.assert_close(attention.receptance.weight @ attention.receptance.weight.T, torch.eye(D))
    assert not attention.output.weight.any() and attention.x_r.any()
    assert model(torch.arange(6)[None]).logits.isfinite().all()


def test_a_fresh_model_begins_as_its_head_of_the_embeddings():
    """Blocks add nothing at first; linear layers and head are orthogonal."""
    torch.manual_seed(0)
    model = fresh_model(LlamaConfig(**shapes()), torch.float32)
    ids = torch.arange(7)[None]
    embedded = model.model.embed_tokens(ids)
    torch.testing.assert_close(model(ids).logits, model.lm_head(model.model.norm(embedded)))
    layer = model.model.layers[1]
    torch.testing.assert_close(layer.mlp.up_proj.weight.T @ layer.mlp.up_proj.weight, torch.eye(D), atol=1e-5, rtol=0)
    gain = 0.5 * math.sqrt(96 / D)
    torch.testing.assert_close(model.lm_head.weight.T @ model.lm_head.weight, gain**2 * torch.eye(D), atol=1e-5, rtol=0)
