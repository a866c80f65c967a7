"""Students with quantised layers and adapters: what they compute, what teacher mode stays, what is stored."""

import copy

import pytest
import torch
from test_hybrid import logits, packed, teacher

from rwkvinside.adapters import AdapterSpec, is_adapter
from rwkvinside.distill.hybrid import StudentSpec
from rwkvinside.distill.steps import AlignStep
from rwkvinside.distill.structure import Structure, assemble, fixed_tensors, make_plain, structure_lines
from rwkvinside.errors import UserError
from rwkvinside.quantization import relative_error

SPEC = StudentSpec(attention_layers=(1,))
LORA = AdapterSpec(rank=4, groups=("mlp",))


def disturb(model):
    """Every adapter away from its start."""
    for name, parameter in model.canonical_parameters().items():
        if is_adapter(name):
            parameter.data += 0.1 * torch.randn_like(parameter)


def test_teacher_and_align_modes_do_not_hear_of_adapters():
    adapters = (LORA, AdapterSpec("miss", rank=4, groups=("attention", "head")))
    original, batch = teacher(), packed([8, 5], rows=2)
    model = assemble(copy.deepcopy(original), SPEC, Structure(adapters=adapters))
    with torch.no_grad():
        before, errors = logits(model, batch, "student"), model(batch, mode="align")
        disturb(model)
        whole = packed([20], rows=2)
        assert torch.equal(logits(model, whole, "teacher"), original(input_ids=whole.input_ids).logits)
        hidden = model(batch, mode="teacher")
        assert torch.equal(model.teacher_logits(hidden), logits(model, batch, "teacher"))
        assert all(
            torch.equal(a, b) for i in errors for a, b in zip(errors[i], model(batch, mode="align")[i], strict=True)
        )
        assert not torch.allclose(logits(model, batch, "student"), before, atol=1e-2)
    assert model.teacher_changes() == []
    model.set_trainable(["mixer", "adapters"])
    assert model.teacher_changes() == [] and len(model.adapters_beside_mixers()) == 2 * 9 + 5


def test_adapters_on_mixers_learn_in_align():
    model = assemble(teacher(), SPEC, Structure(adapters=(AdapterSpec(rank=2, groups=("mixer.proj",)),)))
    assert set(model.set_trainable(["adapters"])) == {"adapters"} and not model.adapters_beside_mixers()
    AlignStep({0: 1.0, 2: 1.0})(model, packed([8, 5]))[0].backward()
    moved = [n for n, p in model.canonical_parameters().items() if p.grad is not None and p.grad.any()]
    assert len(moved) == 2 * 4 and all("lora_B" in name for name in moved)
    assert any(
        "WARNING" in line
        for line in structure_lines(model, Structure(adapters=(AdapterSpec(rank=2, groups=("mixer.proj",)),)))
    )


@pytest.mark.parametrize(
    "groups", [("mlp", "teacher"), ("head", "attention", "mixer.proj"), (r"model\.layers\.0\..*",)]
)
def test_a_quantised_student_computes_with_the_unpacked_weights(groups):
    model = assemble(teacher(), SPEC, Structure(groups, format="nf4"))
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
    before = assemble(teacher(), SPEC, Structure())
    before.set_trainable(["mixer", "mlp"])
    for parameter in before.canonical_parameters().values():
        parameter.data += 0.01 * parameter.requires_grad
    tensors = {name: t.clone() for name, t in before.student_state_dict().items()}
    model = assemble(teacher(), SPEC, Structure(("mlp", "mixer.proj"), adapters=(LORA,)), tensors)
    kept = model.student_state_dict()
    assert all(torch.equal(kept[name], t) for name, t in tensors.items())
    assert kept.keys() - tensors.keys() == {name for name in kept if is_adapter(name)}
    again = assemble(teacher(), SPEC, Structure(adapters=(LORA,)), kept)  # a later stage that quantises nothing
    assert torch.equal(
        again.canonical_parameters()["model.layers.0.mlp.up_proj.weight"], tensors["model.layers.0.mlp.up_proj.weight"]
    )
    assert model.teacher_changes()  # the MLPs are no longer the teacher's, quantised or not


@pytest.mark.parametrize("adapter", [LORA, AdapterSpec(rank=4, init="pissa"), AdapterSpec("bone", rank=8)])
def test_stored_tensors_give_the_same_student(adapter):
    structure = Structure(("mlp", "teacher"), "fp4", adapters=(adapter,))
    one = assemble(teacher(), SPEC, structure)
    fixed = {name: t.clone() for name, t in fixed_tensors(one).items()}
    disturb_trained = [p for n, p in one.canonical_parameters().items() if is_adapter(n) and ".start" not in n]
    for parameter in disturb_trained:
        parameter.data += 0.1
    torch.manual_seed(7)  # what is drawn anew is not what was
    two = assemble(teacher(), SPEC, structure, {n: t.clone() for n, t in one.student_state_dict().items()}, fixed)
    batch = packed([8, 5])
    with torch.no_grad():
        for mode in ("student", "teacher"):
            assert torch.equal(logits(one, batch, mode), logits(two, batch, mode))
    assert relative_error(one.quantized.values()) == pytest.approx(relative_error(two.quantized.values()))
    with pytest.raises(UserError, match="began with other quantised layers: .*teacher_attn"):
        assemble(teacher(), SPEC, Structure(("mlp",), adapters=(adapter,)), fixed=fixed)
    with pytest.raises(UserError, match="adapters of the checkpoint do not fit: model.layers.0.mlp"):
        assemble(teacher(), SPEC, Structure(), one.student_state_dict())


def test_rounding_for_inputs_lowers_the_error_of_the_teacher():
    batch, errors = packed([40], rows=6), {}
    with torch.no_grad():
        wanted = logits(assemble(teacher(), SPEC, Structure()), batch, "teacher")
        for rounding in ("nearest", "inputs"):
            model = assemble(
                teacher(),
                SPEC,
                Structure(("mlp", "teacher", "attention", "mixer.proj", "head"), rounding=rounding),
                probe=lambda model, mode, readout: model(batch, mode=mode, readout=readout),
            )
            errors[rounding] = (logits(model, batch, "teacher") - wanted).square().mean().item()
    assert errors["inputs"] < 0.7 * errors["nearest"]


def test_rounding_for_inputs_needs_no_text_where_nothing_is_quantised():
    assert not assemble(teacher(), SPEC, Structure(rounding="inputs")).quantized
