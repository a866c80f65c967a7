"""HybridModel: losses and gradients are what they should be, groups mean what they say. What every family has to pass,
exact teachers and separate documents among it, is in tests/families."""

import pytest
import torch
from hybrid_cases import VOCAB, attention_mask_4d, logits, packed, teacher
from plans import stage_plan
from transformers import Qwen3ForCausalLM

from rwkvinside.data.batch import Batch
from rwkvinside.errors import UserError
from rwkvinside.hybrid.calibration import calibrate, teacher_norms
from rwkvinside.hybrid.model import HybridModel
from rwkvinside.hybrid.settings import StudentConfig
from rwkvinside.hybrid.weight_transfer import teacher_tensor, transfer
from rwkvinside.losses.settings import DistillLossConfig
from rwkvinside.stages.steps import AlignStep, DistillStep, SftStep
from rwkvinside.teacher.kinds import TeacherKind
from rwkvinside.teacher.signals import OnlineTeacher, SelfTeacher, TeacherModel


def test_padding_tail_changes_no_loss():
    hybrid = HybridModel.from_teacher(teacher(), StudentConfig()).double()
    batch = packed([9, 6])
    pad = torch.zeros(1, 5, dtype=torch.long)
    padded = Batch(
        torch.cat([batch.input_ids, pad], 1),
        torch.cat([batch.labels, pad - 100], 1),
        torch.cat([batch.position_ids, pad], 1),
        torch.cat([batch.segment_ids, pad.int()], 1),
        (0,),
    )
    for step in (AlignStep({0: 1.0, 1: 1.0, 2: 1.0}), DistillStep(SelfTeacher(), DistillLossConfig(ce=0.5)), SftStep()):
        assert step.count(batch) == step.count(padded)
        # 1e-6: sums over tokens are fp32 by design
        assert step(hybrid, batch)[0].item() == pytest.approx(step(hybrid, padded)[0].item(), rel=1e-6)


def test_align_loss_is_the_relative_error_of_each_layer_on_teacher_activations():
    hybrid = HybridModel.from_teacher(teacher(), StudentConfig()).double()
    batch = packed([8, 5], rows=2)
    seen = {}
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda m, args, kwargs, i=i: seen.update({i: (kwargs["hidden_states"], kwargs["position_embeddings"])}),
            with_kwargs=True,
        )
        for i, layer in enumerate(hybrid.lm.model.layers)
    ]
    norms, before = teacher_norms(hybrid, [batch])
    for hook in hooks:
        hook.remove()
    loss, metrics = AlignStep(norms)(hybrid, batch)
    # 1e-6 here and below: errors are summed in fp32 by design
    assert loss.item() / batch.num_tokens == pytest.approx(sum(before.values()) / 3, rel=1e-6)
    # layer 1 by hand, each document alone, from the teacher's own hidden states
    x, rope = seen[1]
    x0, rope0 = seen[0]
    attention, mixers = hybrid.lm.model.layers[1].self_attn.teacher_attn, hybrid.mixers
    error = norm = 0.0
    for row in range(2):
        for a, b in ((0, 8), (8, 13)):
            cut = slice(a, b)
            here = tuple(r[row : row + 1, cut] for r in rope)
            target, _ = attention(x[row : row + 1, cut], position_embeddings=here, attention_mask=None)
            _, first, _ = _mix(mixers[0], x0[row : row + 1, cut], None, here)
            y, _, _ = _mix(mixers[1], x[row : row + 1, cut], first, here)
            error += (y - target).square().sum().item()
            norm += target.square().sum().item()
    assert before[1] == pytest.approx(error / norm, rel=1e-6)
    assert norms[1] == pytest.approx(norm / batch.num_tokens, rel=1e-6)
    assert metrics["layers"].shape == (3,)


def _mix(mixer, x, first, rope):
    from rwkvinside.modeling.time_mixer import TimeMixer

    return TimeMixer.forward(mixer, x, first=first, rope=rope)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_window_over_everything_is_the_teacher(family):
    """With copied projections: in a softmax, from which nothing is left for a recurrence, and in a sum without one."""
    batch = packed([9, 1, 30, 4], rows=2)
    close = 1e-5 if family == "qwen3" else 1e-10  # Qwen3's own norms of queries and keys are computed in fp32
    hybrid = HybridModel.from_teacher(teacher(family), StudentConfig(window=30, sinks=2)).double()
    expected = logits(hybrid, batch, "teacher")
    torch.testing.assert_close(logits(hybrid, batch, "student"), expected, rtol=0, atol=close)

    hybrid = HybridModel.from_teacher(teacher(family), StudentConfig(window=30, sinks=2, window_mix="sum")).double()
    assert not torch.allclose(logits(hybrid, batch, "student"), expected, atol=1e-3)
    for mixer in hybrid.mixers.values():
        assert (mixer.mix_recurrence == 1).all() and (mixer.mix_window == 0).all(), "the start"
        mixer.mix_recurrence.data.zero_()
        mixer.mix_window.data.fill_(1)
    torch.testing.assert_close(logits(hybrid, batch, "student"), expected, rtol=0, atol=close)


def test_a_sum_with_a_window_starts_as_the_mixer_without_one():
    batch = packed([9, 20])
    plain, windowed = (
        logits(HybridModel.from_teacher(teacher(), StudentConfig(**fields)), batch, "student")
        for fields in ({}, {"window": 4, "sinks": 1, "window_mix": "sum"})
    )
    assert torch.equal(plain, windowed)


@pytest.mark.parametrize(
    "objective, what", [("align", "mixers"), ("align", "recurrence"), ("distill", "layers"), ("distill", "recurrence")]
)
@pytest.mark.parametrize("window", [0, 4])
def test_what_is_computed_again_changes_no_gradient(objective, what, window):
    gradients = []
    for recompute in (None, what):
        hybrid = HybridModel.from_teacher(teacher(), StudentConfig(attention_layers=(1,), window=window)).double()
        hybrid.recompute(recompute)
        hybrid.set_trainable(
            ["mixer"] if objective == "align" else ["mixer", "mlp", "norms", "embed", "head", "attention"]
        )
        separate = OnlineTeacher(TeacherModel(teacher().double()))
        if objective == "align":
            step = AlignStep({0: 2.0, 2: 3.0})
        else:
            step = DistillStep(separate, DistillLossConfig(chunk_tokens=7 if recompute else 1000))
        step(hybrid, packed([8, 5], rows=2))[0].backward()
        gradients.append({n: p.grad for n, p in hybrid.canonical_parameters().items() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        assert torch.allclose(gradient, gradients[1][name], atol=1e-12), name


def test_the_teacher_has_no_dropout():
    """Not in any mode of a student that recomputes its layers, whatever the teacher was trained with."""
    lm = teacher(attention_dropout=0.5)
    batch = packed([8, 5], rows=2)
    hybrid = HybridModel.from_teacher(lm, StudentConfig(attention_layers=(1,))).double().eval()
    expected = {mode: logits(hybrid, batch, mode) for mode in ("teacher", "student")}
    errors = hybrid(batch, mode="align")
    hybrid.recompute("layers")
    assert [m for m in hybrid.modules() if m.training] == list(hybrid.family.layers(hybrid.lm))
    for mode, plain in expected.items():
        assert torch.equal(logits(hybrid, batch, mode), plain), mode
    assert hybrid(batch, mode="align") == errors
    signal = SelfTeacher().signal(hybrid, batch)
    (chunk,) = signal.chunks(1000)
    found = chunk.distribution(slice(None), VOCAB, 1.0).log_probs
    torch.testing.assert_close(found, expected["teacher"][batch.labels != -100].log_softmax(-1))


@pytest.mark.parametrize("detach", [False, True])
def test_v_first_gradient_reaches_the_first_layer(detach):
    hybrid = HybridModel.from_teacher(teacher(), StudentConfig(detach_first=detach)).double()
    batch = packed([12])
    hybrid.set_trainable(["mixer"])
    # only the last layer's own error: layer 0 can hear of it through v_first and k_first alone
    errors = hybrid(batch, mode="align")
    errors[2][0].backward()
    first = hybrid.mixers[0]
    reached = [w.weight.grad is not None and bool(w.weight.grad.abs().max() > 0) for w in (first.value, first.key)]
    assert reached == [not detach] * 2
    assert first.w0.grad is None or not first.w0.grad.any()


def test_v_first_gradient_is_part_of_the_first_layers_gradient_in_distill():
    gradients = []
    for detach in (False, True):
        hybrid = HybridModel.from_teacher(teacher(), StudentConfig(detach_first=detach)).double()
        hybrid.set_trainable(["mixer"])
        DistillStep(SelfTeacher())(hybrid, packed([12]))[0].backward()
        gradients.append([w.weight.grad for w in (hybrid.mixers[0].value, hybrid.mixers[0].key)])
    for through, cut in zip(*gradients, strict=True):
        assert (through - cut).norm() > 1e-3 * through.norm()  # residual mixes start at 1.8 %: small, but not rounding


def test_distill_step_equals_brute_force():
    hybrid = HybridModel.from_teacher(teacher(), StudentConfig()).double()
    wide = teacher(vocab_size=VOCAB + 14).double()  # a padded vocabulary: cut to the shared ids
    batch = packed([8, 5], rows=2)
    step = DistillStep(
        OnlineTeacher(TeacherModel(wide)), DistillLossConfig(kl=0.7, ce=0.3, temperature=2.0, chunk_tokens=5)
    )
    loss, metrics = step(hybrid, batch)
    s = logits(hybrid, batch, "student")
    with torch.no_grad():
        t = wide(
            input_ids=batch.input_ids, attention_mask=attention_mask_4d(batch), position_ids=batch.position_ids
        ).logits
    kl = ce = agree = 0.0
    for b, pos in (batch.labels != -100).nonzero().tolist():
        p = (t[b, pos, :VOCAB] / 2).softmax(-1)
        kl += 4 * (p * (p.log() - (s[b, pos] / 2).log_softmax(-1))).sum()
        ce -= s[b, pos].log_softmax(-1)[batch.labels[b, pos]]
        agree += int(s[b, pos].argmax() == t[b, pos, :VOCAB].argmax())
    assert loss.item() == pytest.approx((0.7 * kl + 0.3 * ce).item(), rel=1e-6)  # softmax sums are fp32
    assert metrics["kl"].item() == pytest.approx(kl.item(), rel=1e-6)
    assert metrics["ce"].item() == pytest.approx(ce.item(), rel=1e-6)
    assert metrics["agreement"].item() == agree


def test_same_weights_teacher_equals_a_separate_one_and_is_refused_when_the_rest_trains():
    hybrid = HybridModel.from_teacher(teacher(), StudentConfig())
    batch = packed([8, 5])
    same, _ = DistillStep(SelfTeacher())(hybrid, batch)
    separate, _ = DistillStep(OnlineTeacher(TeacherModel(teacher())))(hybrid, batch)
    assert same.item() == pytest.approx(separate.item(), rel=1e-6)
    plan = stage_plan(
        objective="distill",
        tokens=64,
        train=["mixer"],
        data={"seq_len": 8},
        batch={"tokens": 16},
        optim={},
        loss={},
        teacher="same",
    )
    assert plan.stage.prepare(hybrid, plan, ["mixer"]) is TeacherKind.SELF
    with pytest.raises(UserError, match="teacher: same cannot be used: .*mlp"):
        plan.stage.prepare(hybrid, plan, ["mixer", "mlp"])


def trained_names(hybrid):
    return {name for name, parameter in hybrid.canonical_parameters().items() if parameter.requires_grad}


def test_groups():
    hybrid = HybridModel.from_teacher(teacher(), StudentConfig(attention_layers=(1,)))
    assert set(hybrid.set_trainable(["mixer.lora"])) == {"mixer.lora"}
    names = trained_names(hybrid)
    assert "model.layers.0.self_attn.w0" in names and "model.layers.2.self_attn.k2" in names
    assert not any(n.split(".")[-2] in ("receptance", "output", "r_norm") for n in names)
    hybrid.set_trainable(["mixer", r"model\.layers\.1\.self_attn\.o_proj\.weight"])
    assert trained_names(hybrid) - hybrid.mixer_names() == {"model.layers.1.self_attn.o_proj.weight"}
    table = {group: (trained, total) for group, trained, total in hybrid.group_table()}
    assert table["mlp"][0] == 0 < table["mlp"][1] and table["mixer.proj"][0] == table["mixer.proj"][1]
    # every parameter of the student is in exactly one row of the table
    assert sum(total for _, total in table.values()) == sum(p.numel() for p in hybrid.canonical_parameters().values())
    for pattern in ("mixers", "model.layers.9.*", "(["):
        with pytest.raises(UserError, match="train pattern"):
            hybrid.set_trainable([pattern])


def test_state_dict_round_trip_and_refusals():
    spec = StudentConfig()
    one = HybridModel.from_teacher(teacher(), spec)
    one.set_trainable(["mixer", "head"])
    with torch.no_grad():
        for p in one.canonical_parameters().values():
            if p.requires_grad:
                p.add_(0.1)
    state = {n: t.clone() for n, t in one.student_state_dict().items()}
    assert "lm_head.weight" in state and "model.embed_tokens.weight" not in state
    two = HybridModel.from_teacher(teacher(), spec)
    two.load_student_state_dict(state)
    batch = packed([9])
    with torch.no_grad():
        assert torch.equal(logits(one, batch, "student"), logits(two, batch, "student"))
    other = HybridModel.from_teacher(teacher(), StudentConfig(preset="hxa07a"))
    with pytest.raises(UserError, match="does not fit this student"):
        other.load_student_state_dict(state)
    with pytest.raises(UserError, match="is missing"):
        two.load_student_state_dict({n: t for n, t in state.items() if not n.endswith(".0.self_attn.w0")})


def test_a_student_that_keeps_all_layers_is_the_teacher_in_every_mode():
    batch = packed([20])
    expected = teacher()(batch.input_ids).logits
    model = HybridModel.from_teacher(teacher(), StudentConfig(attention_layers=(0, 1, 2)))
    assert model.rwkv_layers == [] and model.student_state_dict() == {}
    for mode in ("student", "teacher", "control"):
        torch.testing.assert_close(logits(model, batch, mode), expected, rtol=0, atol=1e-6)
    assert model(batch, "align") == {}


def test_refusals_of_teachers_and_layers():
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(UserError, match="'gpt2', which is not supported\nsupported: llama, .*docs/families.md"):
        HybridModel.from_teacher(
            GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)), StudentConfig()
        )
    with pytest.raises(UserError, match="has layer 7, but there are layers 0 to 2"):
        HybridModel.from_teacher(teacher(), StudentConfig(attention_layers=(0, 7)))
    with pytest.raises(UserError, match="still to be chosen"):
        HybridModel.from_teacher(teacher(), StudentConfig(attention_layers={"choose": "restore", "keep": 1}))


@pytest.mark.parametrize("family, preset", [("qwen3", "x070"), ("qwen3", "arwkv7"), ("qwen2", "arwkv7")])
def test_presets_without_norms_and_biases_leave_them_out(family, preset):
    lm = teacher(family, num_key_value_heads=2)
    with torch.no_grad():
        for name, p in lm.named_parameters():
            if "q_norm" in name or "k_norm" in name or name.endswith(".bias"):
                p.uniform_(0.5, 1.5)
    hybrid = HybridModel.from_teacher(lm, StudentConfig(preset=preset))
    for i, mixer in hybrid.mixers.items():
        attention = hybrid.attention(i).teacher_attn
        config, own = mixer.mixer_config, dict(mixer.named_parameters())
        assert not config.qk_norm and "r_norm.weight" not in own and "receptance.bias" not in own
        for name, norm, target in (("q_proj", "q_norm", "receptance"), ("k_proj", "k_norm", "key")):
            weight = getattr(attention, name).weight.unflatten(0, (-1, config.head_size))
            if family == "qwen3":  # a norm multiplies the channels of every head
                weight = weight * getattr(attention, norm).weight[:, None]
            assert torch.equal(own[f"{target}.weight"], weight.flatten(0, 1))
            sources = hybrid.family.sources(lm.config, i)
            again = teacher_tensor(f"{name}.weight", mixer, sources, attention)
            torch.testing.assert_close(again, getattr(attention, name).weight)
        assert torch.equal(own["value.weight"], attention.v_proj.weight)


def test_a_tensor_that_no_preset_leaves_out_is_refused():
    hybrid = HybridModel.from_teacher(teacher("qwen3"), StudentConfig())
    attention, mixer = hybrid.attention(0).teacher_attn, hybrid.mixers[0]
    attention.sink = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match="has sink, which this mixer preset does not have"):
        transfer(attention, mixer, hybrid.family.sources(hybrid.lm.config, 0))


def test_head_and_embedding_are_one_matrix_until_one_trains():
    hybrid = HybridModel.from_teacher(teacher(), StudentConfig())
    names = set(hybrid.canonical_parameters())
    hybrid.set_trainable(["mixer"])
    assert hybrid.teacher_tied and hybrid.tied
    hybrid.set_trainable(["head"])
    head, embedding = hybrid.lm.lm_head.weight, hybrid.lm.model.embed_tokens.weight
    assert not hybrid.tied and torch.equal(head, embedding) and not embedding.requires_grad
    assert set(hybrid.canonical_parameters()) == names
    with torch.no_grad():
        head.add_(1)
    assert not torch.equal(head, embedding)


@pytest.mark.parametrize("preset", ["cxa079", "hxa07a", "cxa076r"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_calibration_lowers_the_alignment_error(preset, family):
    hybrid = HybridModel.from_teacher(teacher(family), StudentConfig(preset=preset))
    batches = [packed([30, 14], rows=2), packed([5, 39], rows=2)]
    _, before = teacher_norms(hybrid, batches)
    fits = calibrate(hybrid, batches)
    _, after = teacher_norms(hybrid, batches)
    assert sorted(fits) == [0, 1, 2]
    for fit in fits.values():
        assert fit.error <= fit.error_before + 1e-6 and fit.error < 1
    # heads are fitted before the output projection mixes them, so a single layer may gain little; all together must
    # gain
    assert sum(after.values()) < 0.9 * sum(before.values())


def test_calibration_survives_a_dead_head():
    model = teacher()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[:16] = 0  # the first key/value head, which two heads read
    hybrid = HybridModel.from_teacher(model, StudentConfig())
    fit = calibrate(hybrid, [packed([30, 14])])[1]
    assert fit.scale[:2] == [0, 0] and fit.bonus[:2] == [0, 0] and all(abs(x) > 0 for x in fit.scale[2:])
    assert all(p.isfinite().all() for p in hybrid.parameters())


def test_meta_device_makes_shapes_only():
    with torch.device("meta"):
        model = Qwen3ForCausalLM(teacher().config)
    hybrid = HybridModel.from_teacher(model, StudentConfig())
    assert all(p.is_meta for p in hybrid.parameters())
    assert hybrid.set_trainable(["mixer"])["mixer.proj"] > 0


def test_a_batch_without_targets_has_a_zero_loss_with_a_graph():
    hybrid = HybridModel.from_teacher(teacher(), StudentConfig())
    hybrid.set_trainable(["mixer", "head"])
    batch = packed([1], rows=2)  # a document of one token predicts nothing
    for step in (DistillStep(SelfTeacher()), SftStep()):
        assert step.count(batch) == 0
        loss, metrics = step(hybrid, batch)
        assert loss.item() == 0 and "ce" in metrics
        loss.backward()
    assert not hybrid.lm.lm_head.weight.grad.any()
