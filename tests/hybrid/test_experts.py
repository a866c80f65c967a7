"""Experts that are quantized or adapted: values, gradients, what a graph keeps, files, and PEFT's own view of them."""

import copy
from types import SimpleNamespace

import pytest
import torch
from hybrid_cases import batch_of, doubled, logits, packed, teacher
from peft import PeftModel
from plans import layer_spec
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM

from rwkvinside.errors import UserError
from rwkvinside.evaluate.in_training import judging
from rwkvinside.export.build import build_hybrid
from rwkvinside.hybrid import experts
from rwkvinside.hybrid.adapters import write_peft
from rwkvinside.hybrid.assemble import adapters_of, apply, assemble, frozen_weights_of, make_plain, take_adapters
from rwkvinside.hybrid.experts import StackedExperts, expert_weights, flatten_experts
from rwkvinside.hybrid.quantized_linear import linear_names, quantize
from rwkvinside.hybrid.settings import AdapterConfig, StudentConfig
from rwkvinside.stages.steps import DistillStep
from rwkvinside.teacher.signals import SelfTeacher

SPEC = StudentConfig(attention_layers=(1,))
LORA = AdapterConfig(groups=["mlp"], rank=3, rank_stabilized=True)
IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"]
STACKS = [f"model.layers.{i}.mlp.experts.{name}" for i in (0, 2) for name in ("gate_up_proj", "down_proj")]


def sparse():
    return teacher("qwen3_moe")


def student(quantized=(), adapters=(), format="nf4", **given):
    model = assemble(sparse(), SPEC, layer_spec(quantized, format=format, adapters=adapters), **given)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.canonical_parameters().items():
            if ".lora_B." in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=g))
    return model


def stacks(model):
    return {name: model.lm.get_submodule(name) for name in STACKS}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "quantized, adapters", [(("mlp",), ()), ((), (LORA,)), (("mlp",), (LORA,))], ids=["quantized", "adapted", "both"]
)
def test_values_and_gradients_are_those_of_plain_experts(quantized, adapters, implementation):
    model, batch = student(quantized, adapters), packed([9, 11], rows=2)
    plain = copy.deepcopy(model)
    make_plain(plain)
    for m in (model, plain):
        m.lm.set_experts_implementation(implementation)
        m.set_trainable(["mixer", "norms", *(["adapters"] if adapters and m is model else [])])
    weights = {name: plain.lm.get_parameter(f"{name}.base_layer").requires_grad_() for name in STACKS}
    found, wanted = (logits(m, batch, "student") for m in (model, plain))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    pull = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(found)
    (found * pull).sum().backward()
    (wanted * pull).sum().backward()
    others = dict(plain.named_parameters())
    for name, p in model.named_parameters():
        if p.requires_grad and "lora" not in name:
            torch.testing.assert_close(p.grad, others[name].grad, rtol=1e-3, atol=1e-3)
    for name, stack in stacks(model).items() if adapters else ():
        dense = weights[name].grad
        a, b = stack.lora_A["default"].weight, stack.lora_B["default"].weight
        for e in range(4):  # d(W + s B A) by A and B of one expert
            a_e, b_e, s = a[3 * e : 3 * e + 3], b[:, e::4], stack.scaling
            assert s == 6 / 3**0.5
            torch.testing.assert_close(a.grad[3 * e : 3 * e + 3], s * b_e.t() @ dense[e], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(b.grad[:, e::4], s * dense[e] @ a_e.t(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_graph_keeps_nothing_that_was_unpacked_or_added_up(implementation, monkeypatch):
    model = student(("mlp",), (LORA,))
    model.lm.set_experts_implementation(implementation)
    model.set_trainable(["mixer", "adapters"])
    stack, kept, pack = model.lm.model.layers[2].mlp.experts, [], experts._MadeAgain.pack
    monkeypatch.setattr(experts._MadeAgain, "pack", lambda *a: (kept.append(pack(*a)), kept[-1])[1])
    made = {w.shape.numel() for w in stack.weights.values()} | {w.shape[1:].numel() for w in stack.weights.values()}
    x = torch.randn(6, 32, requires_grad=True)
    choice, share = torch.tensor([[0, 1], [1, 2], [2, 3]] * 2), torch.rand(6, 2)
    with saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = stack(x, choice, share)
    tensors = [t for t in kept if isinstance(t, torch.Tensor)]
    # the weights are named instead; batched_mm gathers rows of them for every token
    assert (len(tensors) < len(kept)) == (implementation != "batched_mm")
    assert not [t for t in tensors if t.untyped_storage().nbytes() // t.element_size() in made]
    y.sum().backward()
    assert x.grad.any() and all(p.grad.any() for p in stack.parameters() if p.requires_grad)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_recomputed_layers_keep_nothing_of_their_experts(implementation, monkeypatch):
    model, batch, gradients = student(("mlp",), (LORA,)), packed([9, 11], rows=2), []
    model.lm.set_experts_implementation(implementation)
    model.set_trainable(["mixer", "adapters"])
    trained = [p for p in model.parameters() if p.requires_grad]
    for recompute in (False, True):
        if recompute:  # what experts keep is seen by the checkpoint, and not by hooks of their own
            model.recompute("layers")
            with judging(model):
                pass
            monkeypatch.setattr(experts._MadeAgain, "pack", lambda *_: pytest.fail("kept by the experts"))
        loss, _ = DistillStep(SelfTeacher())(model, batch)
        gradients.append(torch.autograd.grad(loss, trained, allow_unused=True))
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-4, atol=1e-5)
    model.recompute(None)
    assert not any(m.recomputed for m in model.modules() if isinstance(m, experts.StackedExperts))


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_packed_experts_are_stored_and_restored(format):
    model = student(("mlp",), format=format)
    assert set(STACKS) <= set(model.quantized) and len(model.quantized) == 7  # one of three layers is dense
    for name, stack in stacks(model).items():
        original = sparse().get_parameter(name)
        error = (stack(torch.float32) - original).norm() / original.norm()
        assert 0 < error < (0.02 if format == "int8" else 0.15)
    stored = frozen_weights_of(model)
    again = student(("mlp",), format=format, frozen_weights=stored)
    batch = packed([12])
    assert torch.equal(logits(model, batch, "student"), logits(again, batch, "student"))
    assert all(torch.equal(t, stored[key]) for key, t in frozen_weights_of(again).items())
    with pytest.raises(UserError, match="this stage began with other quantized layers"):
        student(("head",), format=format, frozen_weights=stored)


def test_trained_experts_keep_their_masters_when_they_are_quantized():
    tensors = student().student_state_dict()
    tensors[STACKS[0]] = torch.randn(4, 48, 32)
    model = student(("mlp",), tensors=tensors)
    assert torch.equal(model.student_state_dict()[STACKS[0]], tensors[STACKS[0]])
    original = tensors[STACKS[0]]
    assert (model.lm.get_submodule(STACKS[0])(torch.float32) - original).norm() / original.norm() < 0.15
    with pytest.raises(UserError, match=r"matches model.layers.0.mlp.experts.\w+ \(and \d more\), which is quantized"):
        model.set_trainable([r".*\.experts\..*"])


def export(model, folder):
    config = sparse().config
    source = SimpleNamespace(teacher_config=lambda: config, teacher_id="tiny")
    build_hybrid(model, source, torch.float32, tie_embeddings=False).save_pretrained(folder)
    return model.family.hybrid_class.from_pretrained(folder).eval()


@pytest.mark.parametrize("quantized", [(), ("mlp",)], ids=["plain", "quantized"])
def test_adapters_are_pefts_and_merge_as_peft_merges_them(quantized, tmp_path):
    model = student(quantized, (LORA,))
    prompt = torch.randint(2, 50, (2, 12), generator=torch.Generator().manual_seed(1))
    expected = logits(model, batch_of(prompt), "student")
    spec = layer_spec(adapters=(LORA,))
    ((_, tensors),) = adapters_of(model, spec)
    assert {name.rsplit(".lora_", 1)[0] for name in tensors} == set(STACKS) | {
        f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")
    }
    merged = export(copy.deepcopy(model), tmp_path / "merged")
    torch.testing.assert_close(merged(prompt).logits, expected, rtol=0, atol=2e-5)

    separate = take_adapters(model, spec)
    base = export(model, tmp_path / "base")
    assert not torch.allclose(base(prompt).logits, expected, atol=1e-2)
    write_peft(tmp_path / "adapter", *separate[0])
    peft = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(peft(prompt).logits, expected, rtol=0, atol=2e-5)
    theirs = dict(peft.merge_and_unload().named_parameters())
    for name, p in merged.named_parameters():
        torch.testing.assert_close(theirs[name], p, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "fields, named",
    [({"kind": "miss"}, "miss"), ({"dora": True}, "dora"), ({"dropout": 0.1}, "dropout"), ({"init": "pissa"}, "init")],
)
def test_adapters_that_experts_cannot_have_are_refused(fields, named):
    with pytest.raises(UserError, match=f"adapters: {named}.* does not fit model.layers.0.mlp.experts"):
        student(adapters=(AdapterConfig(groups=["mlp"], rank=3, **fields),))
    student(adapters=(AdapterConfig(groups=[r".*layers\.1\.mlp.*"], rank=3, **fields),))  # the dense layer can


def test_gptq_is_refused_for_experts():
    spec = layer_spec(("mlp",), method="gptq")
    with pytest.raises(UserError, match="gptq does not fit model.layers.0.mlp.experts.gate_up_proj"):
        assemble(sparse(), SPEC, spec, text=lambda: packed([20]))


def test_a_plan_has_the_layers_of_the_model():
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(copy.deepcopy(sparse().config))
    planned = assemble(lm, SPEC, layer_spec())
    before = {n: p.shape for n, p in planned.canonical_parameters().items()}
    spec = layer_spec(("mlp",), adapters=(LORA,))
    for _ in range(2):
        apply(planned, spec)
        real = student(("mlp",), (LORA,))
        shapes = ({n: p.shape for n, p in m.canonical_parameters().items()} for m in (planned, real))
        assert next(shapes) == next(shapes)
        assert {n: q.nbytes for n, q in planned.quantized.items()} == {n: q.nbytes for n, q in real.quantized.items()}
        apply(planned, layer_spec())
        assert {n: p.shape for n, p in planned.canonical_parameters().items()} == before


def test_every_tensor_of_an_adapter_learns_and_the_teacher_has_none():
    model, batch = student(adapters=(LORA,)), packed([9, 11], rows=2)
    assert torch.equal(logits(model, batch, "teacher"), logits(student(), batch, "teacher"))
    model.set_trainable(["mixer", "adapters"])
    loss, _ = DistillStep(SelfTeacher())(model, batch)
    loss.backward()
    adapters = {n: p for n, p in model.canonical_parameters().items() if ".lora_" in n}
    assert len(adapters) == 14
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in adapters.values())


def test_a_second_teacher_quantizes_its_experts():
    lm, batch = doubled(sparse()), packed([12])
    wanted = lm(batch.input_ids).logits
    flatten_experts(lm, expert_weights(lm))
    assert torch.equal(lm(batch.input_ids).logits, wanted)
    names = quantize(lm, linear_names(lm, skip=("lm_head",)), "int8")
    assert sum(".experts." in name for name in names) == 4
    assert isinstance(lm.model.layers[0].mlp.experts, StackedExperts)
    found = lm(batch.input_ids).logits
    assert 0 < (found - wanted).norm() / wanted.norm() < 0.05
    assert not [n for n, p in lm.named_parameters() if isinstance(p, nn.Parameter) and p.ndim == 3]
