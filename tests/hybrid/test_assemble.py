"""Students with quantized layers and adapters: what they compute, what teacher mode stays, what is stored."""

import copy
from dataclasses import replace

import pytest
import torch
from hybrid_cases import logits, packed, teacher
from plans import layer_spec

from rwkvinside.errors import UserError
from rwkvinside.hybrid import gptq
from rwkvinside.hybrid.adapters import is_adapter
from rwkvinside.hybrid.assemble import assemble, frozen_weights_of, layer_lines, make_plain
from rwkvinside.hybrid.quantized_linear import relative_error
from rwkvinside.hybrid.settings import AdapterConfig, StudentConfig
from rwkvinside.stages.steps import AlignStep

SPEC = StudentConfig(attention_layers=(1,))
LORA = AdapterConfig(rank=4, groups=["mlp"])


def disturb(model):
    """Every adapter away from its start."""
    for name, parameter in model.canonical_parameters().items():
        if is_adapter(name):
            parameter.data += 0.1 * torch.randn_like(parameter)


def test_teacher_and_align_modes_do_not_hear_of_adapters():
    adapters = (LORA, AdapterConfig(kind="miss", rank=4, groups=["attention", "head"]))
    original, batch = teacher(), packed([8, 5], rows=2)
    model = assemble(copy.deepcopy(original), SPEC, layer_spec(adapters=adapters))
    with torch.no_grad():
        before, errors = logits(model, batch, "student"), model(batch, mode="align")
        disturb(model)
        whole = packed([20], rows=2)
        assert torch.equal(logits(model, whole, "teacher"), original(input_ids=whole.input_ids).logits)
        hidden = model(batch, mode="teacher")
        assert torch.equal(model.teacher_head(hidden), logits(model, batch, "teacher"))
        assert all(
            torch.equal(a, b) for i in errors for a, b in zip(errors[i], model(batch, mode="align")[i], strict=True)
        )
        assert not torch.allclose(logits(model, batch, "student"), before, atol=1e-2)
    assert model.teacher_changes() == []
    model.set_trainable(["mixer", "adapters"])
    assert model.teacher_changes() == [] and len(model.adapters_beside_mixers()) == 2 * 9 + 5


def test_adapters_on_mixers_learn_in_align():
    model = assemble(teacher(), SPEC, layer_spec(adapters=(AdapterConfig(rank=2, groups=["mixer.proj"]),)))
    assert set(model.set_trainable(["adapters"])) == {"adapters"} and not model.adapters_beside_mixers()
    AlignStep({0: 1.0, 2: 1.0})(model, packed([8, 5]))[0].backward()
    moved = [n for n, p in model.canonical_parameters().items() if p.grad is not None and p.grad.any()]
    assert len(moved) == 2 * 4 and all("lora_B" in name for name in moved)
    assert any(
        "WARNING" in line
        for line in layer_lines(model, layer_spec(adapters=(AdapterConfig(rank=2, groups=["mixer.proj"]),)))
    )


@pytest.mark.parametrize(
    "groups", [("mlp", "teacher"), ("head", "attention", "mixer.proj"), (r"model\.layers\.0\..*",)]
)
def test_a_quantized_student_computes_with_the_unpacked_weights(groups):
    model = assemble(teacher(), SPEC, layer_spec(groups, format="nf4"))
    names = set(model.quantized)
    batch = packed([8, 5], rows=2)
    with torch.no_grad():
        got = {mode: logits(model, batch, mode) for mode in ("student", "teacher")}
        make_plain(model)
        assert not model.quantized
        for mode, wanted in got.items():
            assert torch.equal(logits(model, batch, mode), wanted)
    assert names and not any("embed" in name or "norm" in name for name in names)


def test_what_was_trained_before_is_carried_in_full_precision():
    before = assemble(teacher(), SPEC, layer_spec())
    before.set_trainable(["mixer", "mlp"])
    for parameter in before.canonical_parameters().values():
        parameter.data += 0.01 * parameter.requires_grad
    tensors = {name: t.clone() for name, t in before.student_state_dict().items()}
    model = assemble(teacher(), SPEC, layer_spec(("mlp", "mixer.proj"), adapters=(LORA,)), tensors)
    kept = model.student_state_dict()
    assert all(torch.equal(kept[name], t) for name, t in tensors.items())
    assert kept.keys() - tensors.keys() == {name for name in kept if is_adapter(name)}
    again = assemble(teacher(), SPEC, layer_spec(adapters=(LORA,)), kept)  # a later stage that quantizes nothing
    assert torch.equal(
        again.canonical_parameters()["model.layers.0.mlp.up_proj.weight"], tensors["model.layers.0.mlp.up_proj.weight"]
    )
    assert model.teacher_changes()  # the MLPs are no longer the teacher's, quantized or not


@pytest.mark.parametrize("adapter", [LORA, AdapterConfig(rank=4, init="pissa"), AdapterConfig(kind="bone", rank=8)])
def test_stored_tensors_give_the_same_student(adapter):
    layers = layer_spec(("mlp", "teacher"), "fp4", adapters=(adapter,))
    one = assemble(teacher(), SPEC, layers)
    fixed = {name: t.clone() for name, t in frozen_weights_of(one).items()}
    disturb_trained = [p for n, p in one.canonical_parameters().items() if is_adapter(n) and ".start" not in n]
    for parameter in disturb_trained:
        parameter.data += 0.1
    torch.manual_seed(7)  # what is drawn anew is not what was
    two = assemble(teacher(), SPEC, layers, {n: t.clone() for n, t in one.student_state_dict().items()}, fixed)
    batch = packed([8, 5])
    with torch.no_grad():
        for mode in ("student", "teacher"):
            assert torch.equal(logits(one, batch, mode), logits(two, batch, mode))
    assert relative_error(one.quantized.values()) == pytest.approx(relative_error(two.quantized.values()))
    with pytest.raises(UserError, match="began with other quantized layers: .*teacher_attn"):
        assemble(teacher(), SPEC, layer_spec(("mlp",), adapters=(adapter,)), frozen_weights=fixed)
    with pytest.raises(UserError, match="adapters of the checkpoint do not fit: model.layers.0.mlp"):
        assemble(teacher(), SPEC, layer_spec(), one.student_state_dict())


def test_gptq_lowers_the_error_of_the_teacher():
    batch, errors = packed([40], rows=6), {}
    with torch.no_grad():
        wanted = logits(assemble(teacher(), SPEC, layer_spec()), batch, "teacher")
        for method in ("nearest", "gptq"):
            model = assemble(
                teacher(),
                SPEC,
                layer_spec(("mlp", "teacher", "attention", "mixer.proj", "head"), method=method),
                text=lambda: batch,
            )
            errors[method] = (logits(model, batch, "teacher") - wanted).square().mean().item()
    assert errors["gptq"] < 0.7 * errors["nearest"]


@pytest.mark.integration
def test_gptq_makes_good_what_earlier_layers_did(monkeypatch):
    """A fit to what the original model has in that place is worth something on text that it has not seen."""
    layers, errors = layer_spec(("mlp", "attention", "teacher"), method="gptq"), {}
    fits = {"fitted": gptq.refit, "not fitted": lambda weight, inputs, target: weight}
    texts = [(packed([40], rows=24, seed=seed), packed([40], rows=6, seed=seed + 1)) for seed in (1, 11, 21, 31)]
    original = assemble(teacher(), SPEC, layer_spec())
    with torch.no_grad():
        for name, fit in fits.items():
            monkeypatch.setattr(gptq, "refit", fit)
            errors[name] = 0.0
            for text, other in texts:
                model = assemble(teacher(), SPEC, layers, text=lambda text=text: text)
                difference = logits(model, other, "teacher") - logits(original, other, "teacher")
                errors[name] += difference.square().mean().item()
    assert errors["fitted"] < 0.9 * errors["not fitted"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [("mlp", "teacher", "head"), ("mixer.proj", "mlp", "attention", "teacher", "head")])
def test_the_text_goes_through_the_original_and_the_quantized_model(monkeypatch, dtype, groups):
    """Layer by layer, the head too: what a layer is fitted to is the original's output, in fp32 whatever the dtype."""
    batch, fits, weights = packed([20, 20], rows=6), [], []
    fit, copies = gptq.refit, gptq._copies

    def watched(weight, inputs, target):
        assert not torch.is_autocast_enabled("cpu") and {inputs.dtype, target.dtype} == {torch.float32}
        fits.append((inputs, target))
        return fit(weight, inputs, target)

    def inputs_of_original(x, device):
        weights.append(copies(x, device)[0])
        return copies(x, device)

    monkeypatch.setattr(gptq, "refit", watched)
    monkeypatch.setattr(gptq, "_copies", inputs_of_original)
    original = assemble(teacher().to(dtype), SPEC, layer_spec())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        hidden = original(batch, mode="teacher").float().flatten(0, 1)
    model = assemble(teacher().to(dtype), SPEC, layer_spec(groups, method="gptq"), text=lambda: batch)
    assert len(fits) == len(model.quantized)
    assert torch.equal(weights[-1], hidden)  # what the head reads in the original
    torch.testing.assert_close(fits[-1][1], hidden @ original.lm.lm_head.weight.float().T)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        after = model(batch, mode="teacher").float().flatten(0, 1)
    torch.testing.assert_close(fits[-1][0], after, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 0.05)
    assert (after - hidden).norm() > 0.01 * hidden.norm()


def test_what_the_stage_before_quantized_alike_keeps_its_bits():
    batch, other = packed([40], rows=6), packed([40], rows=6, seed=4)
    layers = layer_spec(("mlp",), method="gptq")
    before = assemble(teacher(), SPEC, layers, text=lambda: batch)
    fixed = frozen_weights_of(before)
    now = assemble(teacher(), SPEC, layer_spec(("mlp", "teacher"), method="gptq"), text=lambda: other, earlier=fixed)
    assert frozen_weights_of(now).keys() > fixed.keys()
    assert all(torch.equal(tensor, frozen_weights_of(now)[name]) for name, tensor in fixed.items())
    assert relative_error(now.quantized.values()) > 0.01
    for change in ({"block": 32}, {"double": False}, {"format": "fp4"}):
        changed = layers.quantize.model_copy(update=change)
        model = assemble(teacher(), SPEC, replace(layers, quantize=changed), text=lambda: other, earlier=fixed)
        assert all((layer.format, layer.block) == (changed.format, changed.block) for layer in model.quantized.values())
        assert all((layer.outer is not None) == changed.double for layer in model.quantized.values())


def test_gptq_needs_no_text_where_nothing_is_quantized():
    assert not assemble(teacher(), SPEC, layer_spec(method="gptq")).quantized
