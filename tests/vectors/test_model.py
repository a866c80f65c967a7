import numpy
import pytest
import torch
import torch.nn.functional as F

from rwkvinside.errors import UserError
from rwkvinside.vectors import tmd
from rwkvinside.vectors.baselines import best_recent_mean, weighted_by_age
from rwkvinside.vectors.diffusion import LatentDiffusion, RobustNormalizer, signal_levels
from rwkvinside.vectors.losses import cosine, infonce, mse
from rwkvinside.vectors.model import ModelState, VectorModel, build_model
from rwkvinside.vectors.settings import ARCHITECTURES, ModelConfig

SMALL = {"d_in": 48, "d_model": 32, "layers": 2}
OPTIONS = {
    "rwkv7": {"rwkv7": {"head_size": 16}},
    "mamba2": {"mamba2": {"d_state": 8}},
    "hybrid": {"mamba2": {"d_state": 8}},
    "performer": {"performer": {"features": 16}},
}


def small(arch, **more):
    options = {} if arch not in OPTIONS else {"options": OPTIONS[arch]}
    return build_model(ModelConfig(**(SMALL | options | {"arch": arch} | more)))


def test_seed_graph():
    """The flow chart of the RWKV LVM, module by module."""
    for arch in ("rwkv_gru", "rwkv7"):
        model = build_model(ModelConfig(arch=arch))
        linear, norm = model.adapter
        assert linear.weight.shape == (768, 768) and norm.normalized_shape == (768,)
        assert model.project.weight.shape == (512, 768) and len(model.blocks) == 6
        assert model.head.weight.shape == (768, 512) and model.dropout.p == 0.1
        x = torch.randn(2, 5, 768)
        torch.testing.assert_close(model(x).y.norm(dim=-1), torch.ones(2, 5), rtol=0, atol=1e-5)
        assert not torch.equal(model(x).y, model(x).y)  # dropout
        model.eval()
        assert torch.equal(model(x).y, model(x).y)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_streams_as_it_reads_the_whole_context(arch):
    model = small(arch).eval()
    x = F.normalize(torch.randn(3, 7, 48), dim=-1)
    whole = model(x)
    assert whole.y.shape == (3, 7, 48)
    if not model.causal:
        assert whole.state is None
        return
    state = None
    for t in range(7):
        one = model(x[:, t : t + 1], state=state)
        state = one.state
        torch.testing.assert_close(one.y[:, 0], whole.y[:, t], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"residual": "context_mean"},
        {"residual": "recent_mean"},
        {"readout": "attention"},
        {"streams": 3},
        {"quantize": 16},
        {"skip_every": 1, "block": "plain"},
        {"resolutions": (24, 12)},
        {"ffn": 0, "adapter": "none"},
    ],
    ids=str,
)
def test_options_stream_and_train(options):
    model = small("gru", **options).eval()
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    x = F.normalize(torch.randn(2, 5, 48), dim=-1)
    masked, more = model(x, mask=mask), torch.randn(2, 1, 48)
    alone = model(x[:1, :4])
    torch.testing.assert_close(masked.y[:1, :4], alone.y, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        model(more, state=masked.state).y[:1], model(more[:1], state=alone.state).y, rtol=0, atol=1e-6
    )
    prediction = model.train()(x)
    (prediction.y.sum() + sum(part.sum() for part in prediction.lower) + prediction.extra).backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing


def test_context_mean_is_where_training_starts():
    model = small("gru", residual="context_mean").eval()
    x = torch.randn(2, 5, 48)
    torch.testing.assert_close(model(x).y[:, -1], F.normalize(x.mean(1), dim=-1))
    assert isinstance(model(x).state, ModelState)


def test_recent_mean_is_where_training_starts():
    x, target = torch.randn(64, 5, 48), torch.randn(64, 48) + 1
    model = small("gru", residual="recent_mean").eval()
    model.fit(x, target)
    factor, shift = best_recent_mean(x, target)
    expected = F.normalize(weighted_by_age(x, factor) + shift, dim=-1)
    torch.testing.assert_close(model(x).y[:, -1], expected, rtol=0, atol=1e-5)
    model(x).y.sum().backward()
    assert model.age.grad is not None and model.age.grad != 0


def test_deep_layers_still_tell_inputs_apart():
    """Six plain layers of the flow chart's recurrence begin with as much of their input as they need to learn."""
    model = build_model(ModelConfig(arch="rwkv_gru", d_in=48, d_model=64)).eval()
    seen = {}
    model.norm.register_forward_pre_hook(lambda module, args: seen.update(h=args[0]))
    model(F.normalize(torch.randn(32, 5, 48), dim=-1))
    assert seen["h"][:, -1].std(0).mean() > 0.1


def test_losses_are_their_definitions():
    y, target = torch.randn(6, 8).double(), torch.randn(6, 8).double()
    for i in range(6):
        a, b = y[i], target[i]
        assert abs(cosine(y, target)[i] - (1 - a @ b / a.norm() / b.norm())) < 1e-6
        assert abs(mse(y, target)[i] - ((a - b) ** 2).sum()) < 1e-6
        logits = torch.stack([a @ t / a.norm() / t.norm() for t in target]) / 0.1
        assert abs(infonce(y, target, 0.1)[i] - (logits.logsumexp(0) - logits[i])) < 1e-6
    target[1] = target[0]  # no negative of each other
    logits = (F.normalize(y, dim=-1) @ F.normalize(target, dim=-1).T)[0, [0, 2, 3, 4, 5]] / 0.1
    assert abs(infonce(y, target, 0.1)[0] - (logits.logsumexp(0) - logits[0])) < 1e-6


def test_tmd_codes():
    codes = torch.arange(tmd.CODES)
    assert torch.equal(tmd.pack(*tmd.unpack(codes)), codes)
    vectors = tmd.vectors(codes)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(codes)), rtol=0, atol=1e-5)
    assert len(torch.unique(vectors, dim=0)) == len(codes)
    with pytest.raises(ValueError, match="domain must lie in 0 to 15"):
        tmd.pack(torch.tensor(16), torch.tensor(0), torch.tensor(0))


def test_tmd_reaches_the_model_where_it_says_so():
    x, code = torch.randn(2, 5, 48), tmd.vectors(torch.tensor([3, 20_000]))
    torch.manual_seed(0)
    plain = small("mamba2").eval()
    torch.manual_seed(0)
    film = small("mamba2", tmd="film").eval()
    film.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(plain(x).y, film(x, tmd=code).y)  # the identity at its start
    assert small("gru", tmd="concat").adapter[0].weight.shape == (64, 64)
    assert build_model(ModelConfig(arch="gru", tmd="concat")).adapter[0].weight.shape == (784, 784)
    mixer = small("mamba2", tmd="mixer").eval()
    torch.nn.init.normal_(mixer.blocks[0].mixer.tmd_dt.weight)
    assert (mixer(x, tmd=code).y - mixer(x, tmd=code.flip(0)).y).abs().max() > 1e-6
    with pytest.raises(UserError, match="no TMD codes are given"):
        film(x)
    routed = small("hybrid", pattern="gru|lstm", tmd="mixer", options={}).eval()
    torch.nn.init.normal_(routed.blocks[0].mixer.tmd_route.weight)
    assert (routed(x, tmd=code).y - routed(x, tmd=code.flip(0)).y).abs().max() > 1e-6
    with pytest.raises(UserError, match=r"only mamba2, retnet, linformer take codes"):
        small("gru", tmd="mixer")


def test_patterns_and_options_are_checked():
    model = small("hybrid", layers=12)
    kinds = [block.mixer.kind for block in model.blocks]
    assert kinds == ["mamba2"] * 5 + ["attention"] + ["mamba2"] * 5 + ["attention"]
    scales = small("s4", options={"s4": {"d_state": [4, 16]}})
    assert [block.mixer.C.shape[1] for block in scales.blocks] == [2, 8]
    with pytest.raises(UserError, match="no layer is of that kind"):
        small("gru", options={"lstm": {"bidirectional": True}})
    with pytest.raises(UserError, match="whole stack"):
        small("gpt2", pattern="gpt2,attention")


@pytest.mark.parametrize("towers", ["one", "two"])
def test_diffusion(towers):
    model = small(f"lcm_{towers}", diffusion={"towers": towers, "train_steps": 10, "steps": 4}).eval()
    assert isinstance(model, LatentDiffusion)
    x = F.normalize(torch.randn(3, 5, 48), dim=-1)
    model.normalizer.fit(x.flatten(0, 1))
    first = model(x).y
    assert torch.equal(first, model(x).y)  # the same seed, the same sample
    model.seed = 1
    assert not torch.equal(first, model(x).y)
    model.seed, model.guidance = 0, 1.0
    plain = model.sample(x)
    model.guidance = 1.0 + 1e-9  # through the guided path
    torch.testing.assert_close(model.sample(x), plain, rtol=0, atol=1e-5)
    loss, _ = model.denoising_loss(x, x[:, -1])
    loss.backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None and n not in ("nothing",)]


def test_sampling_finds_what_the_denoiser_knows(monkeypatch):
    """Without noise a vector is itself, and a denoiser that is right leads there in any number of steps."""
    model = small("lcm_two").eval()
    x, target = F.normalize(torch.randn(3, 5, 48), dim=-1), torch.randn(3, 48)
    model.fit(x, torch.randn(200, 48) * 2 + 1)
    clean = model.normalizer(target)
    none, all_steps = torch.zeros(3, dtype=torch.long), torch.full((3,), 100)
    noise = torch.randn(3, 48)
    torch.testing.assert_close(model.add_noise(clean, none, noise), clean)
    torch.testing.assert_close(model.add_noise(clean, all_steps, noise), noise, rtol=0, atol=0.02)
    monkeypatch.setattr(model, "denoise", lambda *args: clean)
    for steps in (1, 5, 20):
        model.steps = steps
        torch.testing.assert_close(model.sample(x), target, rtol=0, atol=1e-4)


def test_codes_guide_denoising():
    x, code = F.normalize(torch.randn(2, 5, 48), dim=-1), tmd.vectors(torch.tensor([3, 20_000]))
    model = small("lcm_two", tmd="film").eval()
    assert torch.equal(model(x, tmd=code).y, model(x, tmd=code.flip(0)).y)  # at its start they say nothing
    torch.nn.init.normal_(model.tmd.weight)
    torch.nn.init.normal_(model.denoiser[0].modulate.weight)
    assert (model(x, tmd=code).y - model(x, tmd=code.flip(0)).y).abs().max() > 1e-4
    loss, _ = model.denoising_loss(x, x[:, -1], code)
    loss.backward()
    assert model.tmd.weight.grad.abs().max() > 0
    with pytest.raises(UserError, match="no TMD codes are given"):
        model(x)
    with pytest.raises(UserError, match="with such a head there is no"):
        small("lcm_two", residual="context_mean")


def test_noise_schedule_and_normalizer():
    levels = signal_levels(100)
    assert levels[0] == 1 and (levels.diff() < 0).all() and levels[-1] < 1e-3
    vectors = torch.randn(501, 7) * torch.arange(1, 8) + 3
    normalizer = RobustNormalizer(7)
    normalizer.fit(vectors)
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    expected = preprocessing.RobustScaler(unit_variance=True).fit_transform(vectors.numpy())
    numpy.testing.assert_allclose(normalizer(vectors).numpy(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(normalizer.inverse(normalizer(vectors)), vectors)


def test_vector_model_has_no_tokens():
    for arch in ARCHITECTURES:
        assert not [m for m in small(arch).modules() if isinstance(m, torch.nn.Embedding) and m.num_embeddings > 256]
    assert isinstance(small("gpt2"), VectorModel)
