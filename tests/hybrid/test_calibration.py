"""The start of the mixers: what is fitted to what, and that each fit finds what is there."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hybrid_cases import packed, teacher

from rwkvinside.data.batch import IGNORE, Batch
from rwkvinside.errors import UserError
from rwkvinside.hybrid import calibration
from rwkvinside.hybrid.calibration import RATES, _fit, _Input, calibrate
from rwkvinside.hybrid.layerwise_teacher import AttentionActivations, LayerwiseStudent, LayerwiseTeacher, MixerInputs
from rwkvinside.hybrid.model import HybridModel
from rwkvinside.hybrid.settings import StudentConfig
from rwkvinside.stages.calibrate import Calibrate

NO_ROPE = torch.empty(0), torch.empty(0)  # nothing is projected


def padded(batch, count):
    pad = torch.zeros(len(batch.input_ids), count, dtype=torch.long)
    columns = (batch.input_ids, pad), (batch.labels, pad + IGNORE), (batch.position_ids, pad), (batch.segment_ids, pad)
    ids, labels, positions, segments = (torch.cat([x, p.to(x.dtype)], 1) for x, p in columns)
    return Batch(ids, labels, positions, segments, batch.rows)


def first_layer(batches, family="qwen3", preset="cxa079"):
    """The first mixer of a student and its inputs."""
    hybrid = HybridModel.from_teacher(teacher(family), StudentConfig(preset=preset))
    walk = LayerwiseTeacher(hybrid, batches)
    own = LayerwiseStudent(hybrid, walk, batches).inputs(0)
    mixer = hybrid.mixers[0]
    return mixer, [_Input.of(mixer, 1.0, *fields) for fields in zip(batches, walk.run(0), own, strict=True)]


@pytest.mark.parametrize("kept", [(), (0,), (1,)])
def test_every_mixer_is_fitted_on_what_the_student_gives_it(kept, monkeypatch):
    """Also behind kept attention and with padding: the inputs are those of the finished student's forward."""
    spec = StudentConfig(attention_layers=kept, attention_rope=not kept)
    hybrid = HybridModel.from_teacher(teacher("qwen3"), spec).eval()
    batches = [packed([30, 14], rows=2), padded(packed([21], rows=2), 5)]
    fitted, seen = [], {i: [] for i in hybrid.rwkv_layers}
    monkeypatch.setattr(
        calibration, "_fit", lambda mixer, inputs, own: fitted.append(inputs) or _fit(mixer, inputs, own)
    )
    calibrate(hybrid, batches)
    for i, mixer in hybrid.mixers.items():
        mixer.register_forward_pre_hook(
            lambda m, args, kwargs, i=i: seen[i].append((args[0], kwargs["forward_context"])), with_kwargs=True
        )
    with torch.no_grad():
        for batch in batches:
            hybrid(batch, mode="student")
    for inputs, calls in zip(fitted, seen.values(), strict=True):
        for given, (x, context) in zip(inputs, calls, strict=True):
            assert torch.equal(given.own.x, x)
            assert (given.own.first is None) == (inputs is fitted[0])
            if given.own.first is not None:
                assert torch.equal(given.own.first.v, context.first.read().v)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_target_takes_the_stream_to_the_teachers(scale):
    """Error of earlier layers included, and a token counts relative to its size in both streams."""
    batch = padded(packed([9], rows=2), 3)
    mixer, _ = first_layer([batch], family="llama")
    torch.manual_seed(0)
    shape, D = batch.input_ids.shape, mixer.mixer_config.hidden_size
    theirs, ours = torch.randn(*shape, D), torch.randn(*shape, D)
    theirs[0, 2], ours[1, 3] = 1e4 * theirs[0, 2], 1e4 * ours[1, 3]
    heads = torch.randn(*shape, mixer.output.in_features)
    given = _Input.of(mixer, scale, batch, AttentionActivations(theirs, NO_ROPE, heads), MixerInputs(ours, ours, None))
    behind = theirs + scale * mixer.output(heads)
    torch.testing.assert_close(ours + scale * given.target, behind, rtol=1e-5, atol=1e-3)
    size = ours.square().mean(-1) + behind.square().mean(-1)
    torch.testing.assert_close(given.weight * size, batch.mask.float())
    assert given.weight[0, 2] < 1e-6 < given.weight[0, 1] and given.weight[1, 3] < 1e-6  # neither hides the others


@torch.no_grad()
def test_before_a_norm_the_target_is_the_attentions_output():
    batch = padded(packed([9], rows=2), 3)
    mixer, _ = first_layer([batch], family="olmo2")
    D, heads = mixer.mixer_config.hidden_size, torch.randn(*batch.input_ids.shape, mixer.output.in_features)
    heads[0, 2] *= 1e4
    streams = torch.randn(2, *batch.input_ids.shape, D)
    own = MixerInputs(streams[1], streams[1], None)
    given = _Input.of(mixer, None, batch, AttentionActivations(streams[0], NO_ROPE, heads), own)
    assert torch.equal(given.target, mixer.output(heads))
    torch.testing.assert_close(given.weight * given.target.square().mean(-1), batch.mask.float())


@torch.no_grad()
def test_a_layer_that_the_mixer_can_compute_is_found():
    """Decay, rate, scale and bonus of heads that are made by a mixer; then nothing is left."""
    mixer, inputs = first_layer([packed([400, 112], rows=2)])
    c = mixer.mixer_config
    H, N = c.num_heads, c.head_size
    rates, scales = torch.tensor(RATES)[[1, 3, 4, 6]], torch.tensor([0.5, 2.0, -1.0, 3.0])
    (given,) = inputs
    mixer.a0.copy_(torch.logit(rates).repeat_interleave(N).view_as(mixer.a0))
    mixer.w0.fill_(float(torch.logit(torch.log(torch.tensor(2.0)) / 8 / calibration.DECAY_SCALE)))
    mixer.r_k.fill_(0.25)
    s = mixer.recurrence_inputs(calibration._project(mixer, given))
    y, _ = mixer.run_recurrence(s, None, None, given.batch.documents.cu_seqlens)
    heads = y * scales[:, None]
    mixer.w0.fill_(-1)
    mixer.a0.fill_(0)
    fit = _fit(mixer, [given._replace(heads=heads, target=heads.flatten(2) @ mixer.output.weight.t())])
    assert fit.error < 1e-5 and fit.output_error < 1e-5 < 0.01 < fit.error_before
    assert fit.half_life == pytest.approx([8] * H, rel=1e-4) and fit.rate == pytest.approx(rates.tolist(), rel=1e-4)
    assert fit.scale == pytest.approx(scales.tolist(), rel=1e-2) and fit.bonus == pytest.approx([0.25] * H, rel=1e-2)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_window_over_everything_is_the_teacher(family):
    hybrid = HybridModel.from_teacher(teacher(family), StudentConfig(window=64, sinks=2))
    fits = calibrate(hybrid, [packed([30, 14], rows=2), padded(packed([21], rows=2), 5)])
    for i, mixer in hybrid.mixers.items():
        assert fits[i].error < 1e-6
        torch.testing.assert_close(mixer.mix_window, torch.ones_like(mixer.mix_window), rtol=0, atol=1e-3)
        assert mixer.mix_recurrence.abs().max() < 1e-2


@pytest.mark.parametrize("window_mix", ["sum", "softmax"])
@pytest.mark.parametrize("family, sliding", [("mistral", (0, 1, 2)), ("gemma3_text", (0,))])
def test_nothing_is_missing_beyond_a_window_as_wide_as_the_teachers(family, sliding, window_mix):
    """Gemma's last layer slides, too, but reads what a layer that sees everything has left unfinished."""
    student = StudentConfig(window=teacher(family).config.sliding_window, window_mix=window_mix)
    hybrid = HybridModel.from_teacher(teacher(family), student)
    fits = calibrate(hybrid, [packed([60], rows=3)])
    assert max(fits[i].error for i in sliding) < 1e-5


def test_a_window_leaves_less_to_the_recurrence():
    batches = [packed([90, 38], rows=4)]
    errors = {}
    for window in (0, 4, 16):
        hybrid = HybridModel.from_teacher(teacher("llama"), StudentConfig(window=window))
        errors[window] = sum(fit.output_error for fit in calibrate(hybrid, batches).values())
    assert errors[16] < errors[4] < errors[0]


def test_the_output_projection_takes_back_what_it_can():
    """With it the student's stream is closer to the teacher's than with heads alone."""
    batches = [packed([90, 38], rows=4) for _ in range(4)]
    errors = {}
    for name, fit in {"fitted": calibration.refit, "heads alone": lambda weight, *given: weight}.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(calibration, "refit", fit)
            fits = calibrate(HybridModel.from_teacher(teacher("llama"), StudentConfig()), batches)
        errors[name] = [fit.output_error for fit in fits.values()]
    assert all(a < b for a, b in zip(errors["fitted"], errors["heads alone"], strict=True)), errors


@pytest.mark.parametrize("preset", ["cxa079", "hxa07b", "cxa078", "rad", "x070"])
def test_two_calibrations_are_equal(preset):
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        hybrid = HybridModel.from_teacher(teacher("llama"), StudentConfig(preset=preset))
        fits = calibrate(hybrid, [packed([30, 14], rows=2)])
        found.append((hybrid.student_state_dict(), [dataclasses.asdict(fit) for fit in fits.values()]))
    (one, first), (other, second) = found
    assert first == second and all(torch.equal(x, other[name]) and x.isfinite().all() for name, x in one.items())


def test_linear_attention_has_nothing_to_fit():
    student = HybridModel.from_teacher(teacher("llama"), StudentConfig(preset="x070", linear_attention=True))
    plan = SimpleNamespace(name="calibrate", settings=SimpleNamespace(loss=None))
    with pytest.raises(UserError, match="linear attention has none"):
        Calibrate().check(student, plan)
