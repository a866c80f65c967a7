"""What every teacher family has to pass, in every layout: the same list of checks, and nothing about any one of them.

A line in the registry brings a family in; `hybrid_cases.QUIRKS` has what its published configurations have beside the
usual fields. Weights are random fp32 values, computed with in float64, so that an argmax cannot flip by rounding and
files lose nothing.
"""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from generation_cases import PADDED, check_paths
from hybrid_cases import SLIDING, VOCAB, attention_mask_4d, batch_of, doubled, logits, packed, teacher
from plans import layer_spec
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.modeling_outputs import MoeModelOutputWithPast

from rwkvinside.data.batch import IGNORE, Batch
from rwkvinside.errors import UserError
from rwkvinside.export.huggingface import build_hybrid
from rwkvinside.families import registry
from rwkvinside.families.registry import FAMILIES, find
from rwkvinside.hybrid.assemble import assemble
from rwkvinside.hybrid.calibration import calibrate, teacher_norms
from rwkvinside.hybrid.freezing import GROUPS
from rwkvinside.hybrid.layerwise_teacher import LayerwiseTeacher
from rwkvinside.hybrid.model import HybridModel
from rwkvinside.hybrid.settings import AdapterConfig, StudentConfig
from rwkvinside.hybrid.weight_transfer import teacher_tensor
from rwkvinside.losses.next_token import NextTokenLoss
from rwkvinside.losses.settings import DistillLossConfig
from rwkvinside.modeling.recurrent_cache import RecurrentLayer
from rwkvinside.modeling.registry import HYBRIDS
from rwkvinside.modeling.time_mixer import full_rotation
from rwkvinside.stages.steps import AlignStep, DistillStep, SftStep
from rwkvinside.teacher.signals import OnlineTeacher, SelfTeacher, TeacherModel

LAYERS = 3
LAYOUTS = {  # of every family
    "all": (StudentConfig(), {}),
    "hybrid": (StudentConfig(attention_layers=(1,)), {}),
    "attention-first": (StudentConfig(attention_layers=(0,)), {}),
    "window": (StudentConfig(attention_layers=(1,), window=5, sinks=2), {}),
}
MORE = {  # of some, where what matters is the same in all
    "unrotated": (StudentConfig(attention_layers=(0, 2), attention_rope=False), {}),
    "growing": (StudentConfig(attention_layers=(1,), attention_rope=False, attention_log_base=3.0), {}),
    "cut": (StudentConfig(attention_layers=(0, 1), attention_window=4, attention_sinks=2), {}),
    "cut-growing": (
        StudentConfig(attention_layers=(1, 2), attention_window=7, attention_rope=False, attention_log_base=9.0),
        {},
    ),
    "mha": (StudentConfig(attention_layers=(1,)), {"num_key_value_heads": 4}),
    "untied": (StudentConfig(attention_layers=(2,)), {"tie_word_embeddings": False}),
    "biases": (StudentConfig(attention_layers=(1,)), {"attention_bias": True}),
    "sliding": (StudentConfig(attention_layers=(1,)), SLIDING | {"use_sliding_window": True}),
}
CASES = [(family, layout) for family in FAMILIES for layout in LAYOUTS]
CASES += [("llama", layout) for layout in MORE if layout != "sliding"]
CASES += [("qwen3", "biases"), ("qwen2", "sliding"), ("smollm3", "sliding"), ("glm4", "unrotated")]
CASES += [
    ("gemma2", "growing"),
    ("gemma2", "cut"),
    ("phi3", "cut"),
    ("ministral", "cut-growing"),
]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request):
    """The teacher, and a student every parameter of whose mixers matters."""
    family, layout = request.param
    spec, changes = (LAYOUTS | MORE)[layout]
    return _make(find(family), teacher(family, LAYERS, **changes), spec)


@pytest.fixture(scope="module")
def exported(case, tmp_path_factory):
    return _export(case, tmp_path_factory.mktemp("exported"))


def _make(family, original, spec):
    student = HybridModel.from_teacher(copy.deepcopy(original), spec).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for mixer in student.mixers.values():
            for parameter in mixer.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    doubled(student.lm)
    # float64 throughout, only the order of sums differs; but "eager" has its softmax in fp32, where that shows
    atol = 1e-10 if original.config._attn_implementation == "sdpa" else 2e-6
    return SimpleNamespace(original=doubled(original), student=student.double(), family=family, spec=spec, atol=atol)


def _export(case, folder):
    """The student as it is written to `folder` and read again."""
    model = _read_back(case.student, case.original, case.family, folder)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return doubled(model)


def _read_back(student, original, family, folder):
    source = SimpleNamespace(teacher_config=lambda: original.config, teacher_id="tiny")
    build_hybrid(copy.deepcopy(student), source, torch.float32, tie_embeddings=None).save_pretrained(folder)
    model, info = family.hybrid_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    return model.eval()


def test_registries_name_what_is_there():
    assert {find(name).hybrid for name in FAMILIES} == set(HYBRIDS)
    for name in FAMILIES:
        family = find(name)
        assert family.model_type == name and family.hybrid_class.config_class.model_type == family.hybrid
        assert issubclass(family.hybrid_class.config_class, type(teacher(name, 1).config))
    with pytest.raises(
        UserError, match=r"architecture 'mamba', which is not supported\nsupported: llama, .*families.md"
    ):
        find("mamba")


def test_teachers_that_see_what_follows_are_refused():
    for name in ("gemma2", "gemma3_text"):
        config = teacher(name, 1, use_bidirectional_attention=True).config
        with pytest.raises(UserError, match="the teacher has use_bidirectional_attention"):
            find(name).check(config)


def test_teacher_mode_is_the_original_bit_for_bit(case):
    batch = packed([20], rows=2)
    with torch.no_grad():
        expected = case.original(input_ids=batch.input_ids).logits
        assert torch.equal(logits(case.student, batch, "teacher"), expected)
        assert not torch.allclose(logits(case.student, batch, "student"), expected, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_with_all_layers_kept_it_is_the_teacher_bit_for_bit(family, tmp_path):
    original, everything = teacher(family), StudentConfig(attention_layers=(0, 1, 2))
    student = HybridModel.from_teacher(copy.deepcopy(original), everything).eval()
    batch = packed([20], rows=2)
    expected = original(batch.input_ids).logits
    assert all(torch.equal(logits(student, batch, mode), expected) for mode in ("student", "teacher", "control"))
    exported = _read_back(student, original, find(family), tmp_path)
    assert torch.equal(exported(batch.input_ids).logits, expected)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    padded = F.pad(batch.input_ids, (3, 0)), F.pad(torch.ones_like(batch.input_ids), (3, 0))
    for ids, mask in ((batch.input_ids, torch.ones_like(batch.input_ids)), padded):
        found, wanted = (m.generate(ids, attention_mask=mask, **options) for m in (exported, original))
        assert torch.equal(found, wanted)


def test_the_mixer_starts_as_the_attention(case):
    """Softmax attention over what it projects is the teacher's, windows and caps included; nothing is left over."""
    fresh = HybridModel.from_teacher(copy.deepcopy(case.original), case.spec).double()
    config, batch, called = case.original.config, packed([14], rows=2), {}
    for i in fresh.rwkv_layers:
        hook = lambda m, args, kwargs, out, i=i: called.update({i: (kwargs, out[0])})  # noqa: E731
        fresh.attention(i).register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        fresh(batch, mode="teacher")
    for i, mixer in fresh.mixers.items():
        kwargs, output = called[i]
        x, rope = kwargs["hidden_states"], kwargs["position_embeddings"]
        rope = full_rotation(rope, mixer.mixer_config.head_size) if mixer.mixer_config.rope else None
        with torch.no_grad():
            q, k, v = (z.transpose(1, 2) for z in mixer.project(x, x, x, rope))
            k, v = (z.repeat_interleave(q.shape[1] // z.shape[1], 1) for z in (k, v))
            scores, cap = q @ k.mT * q.shape[-1] ** -0.5, getattr(config, "attn_logit_softcapping", None)
            scores = scores if cap is None else cap * torch.tanh(scores / cap)
            seen = attention_mask_4d(batch).tril().triu(1 - (case.family.window(config, i) or 14))
            heads = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
            got = mixer.output(heads.transpose(1, 2).flatten(2))
        torch.testing.assert_close(got, output, rtol=0, atol=1e-6)  # norms of the teacher's are in fp32

        wrapped = fresh.attention(i).teacher_attn
        attention = dict(wrapped.named_parameters())
        copies, sources = dict(mixer.named_parameters()), case.family.sources(config, i)
        for name, tensor in attention.items():
            torch.testing.assert_close(teacher_tensor(name, mixer, sources, wrapped), tensor, rtol=1e-6, atol=1e-7)
        copied = {target for target, source in sources.items() if source.name in attention}
        groups = {
            n: fresh.group_of(f"{fresh.family.layers_path}.{i}.{fresh.family.attention_path}.{n}") for n in copies
        }
        assert {name for name, group in groups.items() if group[-1] == "mixer.proj"} == copied


def test_mixers_are_what_the_family_says(case):
    student, config = case.student, case.original.config
    for i, made in student.mixer_configs.items():
        assert made == case.family.mixer_config(config, i, case.spec.preset, **case.spec.mixer_overrides(i))
        assert (made.num_heads, made.num_kv_heads) == (config.num_attention_heads, config.num_key_value_heads)


def test_groups_share_out_every_parameter(case):
    student, parameters = case.student, case.student.canonical_parameters()
    groups = {name: student.group_of(name) for name in parameters}
    assert all(set(group) <= set(GROUPS) for group in groups.values())
    kept = [i for i in range(LAYERS) if i not in student.rwkv_layers]
    expected = {"mixer.proj", "mixer.lora", "mlp", "norms", "embed", "head"} | ({"attention"} if kept else set())
    assert {group[-1] for group in groups.values()} == expected
    for name, group in groups.items():
        layer = case.family.layer_of(name)
        assert (layer in student.rwkv_layers) if group[0] == "mixer" else group != ("attention",) or layer in kept
    of = {group: {id(p) for n, p in parameters.items() if groups[n] == (group,)} for group in ("embed", "head", "mlp")}
    assert of["embed"] == {id(p) for p in case.family.embedding(student.lm).parameters()}
    assert of["head"] == {id(p) for p in case.family.head(student.lm).parameters()}
    mlps = [case.family.mlp(layer) for layer in case.family.layers(student.lm)]
    assert of["mlp"] == {id(p) for mlp in mlps for p in mlp.parameters()}


def test_blocks_add_up_to_the_residual_stream(case):
    """The first layer's input and what all blocks give are what the last norm reads; inputs are what they are said to
    be."""
    student, family, seen = case.student, case.family, {}

    def note(name, what):
        def hook(module, args, output):
            seen[name] = args[0] if what == "input" else output

        return hook

    layers = family.layers(student.lm)
    hooks = [layers[0].register_forward_hook(note("stream", "input"))]
    hooks.append(family.final_norm(student.lm).register_forward_hook(note("final", "input")))
    for i, layer in enumerate(layers):
        attention, mlp = getattr(student.attention(i), "teacher_attn", student.attention(i)), family.mlp(layer)
        blocks = {
            "attention": (family.attention_input, family.attention_post_norm, family.attention_linears(attention)),
            "mlp": (family.mlp_input, family.mlp_post_norm, None if family.experts(mlp) else family.mlp_linears(layer)),
        }
        for block, (before, after, linears) in blocks.items():
            inputs, output = linears or ((mlp.gate,), mlp)
            end = output if isinstance(after(layer), torch.nn.Identity) else after(layer)
            reader = before(layer)
            if not isinstance(reader, torch.nn.Identity):
                hooks.append(reader.register_forward_hook(note((i, block, "reader"), "output")))
            hooks.append(end.register_forward_hook(note((i, block, "end"), "output")))
            hooks += [x.register_forward_hook(note((i, block, j), "input")) for j, x in enumerate(inputs)]
            path = next(name for name, module in student.lm.named_modules() if module is output)
            joins = path.replace(".teacher_attn", "").endswith(family.block_ends)
            assert joins == (end is output and linears is not None)
    with torch.no_grad():
        logits(student, packed([9, 4]), "teacher")
    for hook in hooks:
        hook.remove()
    scale = family.residual_scale(student.lm.config)
    total = seen["stream"] + sum(scale * x for key, x in seen.items() if key[-1] == "end")
    torch.testing.assert_close(total, seen["final"], rtol=0, atol=1e-12)
    for key, x in seen.items():
        if isinstance(key, tuple) and isinstance(key[-1], int) and (*key[:2], "reader") in seen:
            assert torch.equal(x.view(-1), seen[(*key[:2], "reader")].view(-1))


@pytest.mark.parametrize("mode", ["teacher", "student"])
def test_packed_documents_equal_the_documents_alone(case, mode):
    batch = packed([7, 1, 12], rows=2)
    with torch.no_grad():
        whole = logits(case.student, batch, mode)
        for row in range(2):
            documents = [batch.input_ids[row : row + 1, a:b] for a, b in ((0, 7), (7, 8), (8, 20))]
            alone = [logits(case.student, batch_of(document), mode)[0] for document in documents]
            torch.testing.assert_close(torch.cat(alone), whole[row], rtol=0, atol=1e-10)


def test_calibration_sees_what_the_attention_sees(case):
    """Layer by layer the same activations as in one forward of the whole model, also with padding."""
    student, family, called, projected = case.student, case.family, {}, {}
    batches = [packed([8, 5], rows=2), _padded(packed([9], rows=1), 4), packed([13], rows=1)]
    hooks = []
    for i in student.rwkv_layers:
        hook = lambda m, args, kwargs, out, i=i: called.setdefault(i, []).append((kwargs, out[0]))  # noqa: E731
        hooks.append(student.attention(i).register_forward_hook(hook, with_kwargs=True))
        output = family.attention_linears(student.attention(i).teacher_attn).output
        hook = lambda m, args, i=i: projected.setdefault(i, []).append(args[0])  # noqa: E731
        hooks.append(output.register_forward_pre_hook(hook))
    with torch.no_grad():
        for batch in batches:
            student(batch, mode="teacher")
    for hook in hooks:
        hook.remove()

    layerwise = LayerwiseTeacher(student, batches)
    for i in range(LAYERS):
        activations = layerwise.run(i)
        assert len(activations) == (len(batches) if i in student.rwkv_layers else 0)
        for j, (stream, rope, heads) in enumerate(activations):
            kwargs, output = called[i][j]
            x = family.attention_input(family.layers(student.lm)[i])(stream)
            assert torch.equal(x, kwargs["hidden_states"]) and torch.equal(heads, projected[i][j])
            assert all(torch.equal(a, b) for a, b in zip(rope, kwargs["position_embeddings"], strict=True))
            with torch.no_grad():
                again = family.attention_linears(student.attention(i).teacher_attn).output(heads)
            assert torch.equal(again, output)


@pytest.mark.parametrize("family", FAMILIES)
def test_calibration_sees_the_heads_of_the_original_projections(family):
    """Where those of the teacher are quantized, the heads are what their originals give from the same input."""
    batch = packed([9, 5], rows=2)
    student = assemble(teacher(family, 1), StudentConfig(), layer_spec(("teacher",)))
    assert any(".teacher_attn." in name for name in student.quantized)
    ((quantized, *_),) = [LayerwiseTeacher(student, [batch]).run(0)]
    ((plain, *_),) = [LayerwiseTeacher(HybridModel.from_teacher(teacher(family, 1), StudentConfig()), [batch]).run(0)]
    assert student.quantized and torch.equal(quantized.stream, plain.stream)
    torch.testing.assert_close(quantized.heads, plain.heads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_calibration_brings_the_student_to_the_teacher(family):
    model = HybridModel.from_teacher(teacher(family), StudentConfig(attention_layers=(1,))).eval()
    batches = [packed([40, 23], rows=4)]
    with torch.no_grad():
        _, before = teacher_norms(model, batches)
        fits = calibrate(model, batches)
        _, after = teacher_norms(model, batches)
    assert all(0 < fit.output_error < 1 for fit in fits.values()), fits
    assert after[0] < min(0.97, before[0])  # the first mixer reads what the teacher's attention reads


@pytest.mark.parametrize("family", FAMILIES)
def test_calibration_with_a_teacher_in_bf16(family):
    """As on a GPU: its weights and activations are bf16, the mixers fp32, products bf16."""
    spec = StudentConfig(attention_layers=(1,), window=8, sinks=2)
    model = HybridModel.from_teacher(teacher(family).bfloat16(), spec).eval()
    with torch.autocast("cpu", torch.bfloat16):
        fits = calibrate(model, [packed([40, 23], rows=4)])
    assert all(0 < fit.output_error < 1 for fit in fits.values()), fits
    assert {p.dtype for mixer in model.mixers.values() for p in mixer.parameters()} == {torch.float32}


@pytest.mark.parametrize("objective", ["align", "distill", "sft"])
def test_everything_that_trains_gets_a_gradient(case, objective):
    student, batch = case.student, packed([9, 11], rows=2)
    student.set_trainable(["mixer"] if objective == "align" else [".*"])
    if objective == "align":
        step = AlignStep(norms=dict.fromkeys(student.rwkv_layers, 1.0))
    elif objective == "distill":
        step = DistillStep(SelfTeacher(), DistillLossConfig(temperature=2.0, ce=0.5, chunk_tokens=7))
    else:
        step = SftStep()
    loss, _ = step(student, batch)
    loss.backward()
    try:
        for name, parameter in student.canonical_parameters().items():
            if parameter.requires_grad:
                assert parameter.grad is not None and parameter.grad.isfinite().all(), name
                assert parameter.grad.any(), name
            else:
                assert parameter.grad is None, name
    finally:
        student.zero_grad()
        student.requires_grad_(False)


@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_and_adapted_layers_train_are_planned_and_exported(family, tmp_path, prompt):
    """Every linear layer but the mixers' and the head's is packed, those of MLPs have adapters; experts included."""
    spec = StudentConfig(attention_layers=(1,))
    layers = layer_spec(("mlp", "attention", "teacher"), adapters=(AdapterConfig(groups=["mlp"], rank=4),))
    student, batch = assemble(teacher(family, 2), spec, layers), packed([9, 11], rows=2)
    assert {student.group_of(f"{name}.weight")[0] for name in student.quantized} == {"mlp", "attention", "teacher"}
    student.set_trainable(["mixer", "norms", "adapters"])
    trained = {name: p for name, p in student.canonical_parameters().items() if p.requires_grad}
    with torch.no_grad():
        for p in trained.values():  # no tensor is without effect
            p.add_(0.1 * torch.randn_like(p))
    for step in (AlignStep(norms={0: 1.0}), DistillStep(SelfTeacher(), DistillLossConfig(chunk_tokens=7))):
        loss, _ = step(student, batch)
        loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in trained.values())
    assert sum(".lora_B." in name for name in trained) >= 4

    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(copy.deepcopy(teacher(family, 2).config))
    planned = assemble(lm, spec, layers)
    for found in (planned, student):
        found.set_trainable(["mixer", "norms", "adapters"])
    assert planned.group_table() == student.group_table()
    sizes = [{name: layer.nbytes for name, layer in m.quantized.items()} for m in (planned, student)]
    assert sizes[0] == sizes[1]

    expected = logits(student, batch_of(prompt), "student")
    case = SimpleNamespace(student=student, family=find(family), original=teacher(family, 2))
    exported = _export(case, tmp_path)
    torch.testing.assert_close(exported(prompt).logits.float(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_of_the_models_own_logits(family):
    """Value and gradients of the loss by chunks are those of transformers' logits under autograd."""
    lm = doubled(teacher(family, 1, tie_word_embeddings=False))
    student, batch = HybridModel.from_teacher(copy.deepcopy(lm), StudentConfig()), packed([20], rows=2)
    student.double().set_trainable(["head", "norms"])
    hidden = lm.model(batch.input_ids, use_cache=False).last_hidden_state.detach().requires_grad_()
    expected = F.cross_entropy(
        _own_logits(lm, hidden).flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    found = hidden.detach().requires_grad_()
    loss, _ = student.lm_head_loss(found, targets=batch.targets, task=NextTokenLoss(chunk_tokens=7))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(found.grad, hidden.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(student.lm.lm_head.weight.grad, lm.lm_head.weight.grad, rtol=0, atol=1e-12)
    signal = OnlineTeacher(TeacherModel(lm)).signal(None, batch)
    distribution = next(signal.chunks(1000)).distribution(slice(None), VOCAB, 1.0)
    wanted = F.log_softmax(lm(batch.input_ids).logits, -1)[batch.labels != IGNORE]
    torch.testing.assert_close(distribution.log_probs, wanted, rtol=0, atol=1e-12)


def _own_logits(lm, hidden):
    """What the model's forward makes of final hidden states."""
    backbone, lm.model = lm.model, Given(hidden)
    try:
        return lm(input_ids=torch.zeros(hidden.shape[:2], dtype=torch.long)).logits
    finally:
        lm.model = backbone


class Given(torch.nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.hidden = hidden

    def forward(self, *args, **kwargs):
        return MoeModelOutputWithPast(last_hidden_state=self.hidden)


def test_the_plan_counts_the_model(case):
    """The student that a plan is made of, on the meta device, has the parameters of the real one."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(copy.deepcopy(case.original.config))
    planned = HybridModel.from_teacher(lm, case.spec)
    for model in (planned, case.student):
        model.set_trainable(["mixer", "norms"])
    table, sizes = planned.group_table(), {n: p.shape for n, p in planned.canonical_parameters().items()}
    assert table == case.student.group_table()
    assert sizes == {n: p.shape for n, p in case.student.canonical_parameters().items()}
    case.student.requires_grad_(False)
    mlps = [case.family.mlp(layer) for layer in case.family.layers(case.student.lm)]
    for i, mlp in enumerate(mlps):
        experts = case.family.experts(mlp)
        assert (experts is None) == (not hasattr(mlp, "experts"))
        if experts is None:
            inputs, output = case.family.mlp_linears(case.family.layers(case.student.lm)[i])
            counted = sum(x.weight.numel() for x in (*inputs, output))
        else:
            counted = sum(x.numel() for x in (experts.inputs, experts.output, experts.router))
        assert counted == sum(p.numel() for p in mlp.parameters() if p.ndim > 1)


def _padded(batch, count):
    pad = torch.zeros(len(batch.input_ids), count, dtype=torch.long)
    return Batch(
        torch.cat([batch.input_ids, pad], 1),
        torch.cat([batch.labels, pad + IGNORE], 1),
        torch.cat([batch.position_ids, pad], 1),
        torch.cat([batch.segment_ids, pad.int()], 1),
        batch.rows,
    )


@pytest.fixture(scope="module")
def prompt():
    return torch.randint(2, VOCAB, (2, 21), generator=torch.Generator().manual_seed(1))


def test_the_export_computes_what_was_trained(case, exported, prompt):
    batch = batch_of(prompt)
    with torch.no_grad():
        expected = logits(case.student, batch, "student")
        torch.testing.assert_close(exported(prompt).logits, expected, rtol=0, atol=case.atol)
        packed_rows = packed([8, 13], rows=2)
        got = exported(packed_rows.input_ids, position_ids=packed_rows.position_ids, use_cache=False).logits
        torch.testing.assert_close(got, logits(case.student, packed_rows, "student"), rtol=0, atol=case.atol)


def test_generation(exported, prompt):
    """Each way once; tests/modeling/test_generation.py has all of them together."""
    check_paths(exported, prompt, new=6, chunks=(5,), padded_ways=PADDED[:2])


def test_cached_logits_equal_a_full_pass(case, exported, prompt):
    full = exported(prompt, use_cache=False).logits
    cache = DynamicCache(config=exported.config)
    parts = [exported(part, past_key_values=cache).logits for part in prompt.split([7, 1, 1, 12], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=case.atol)
    assert cache.get_seq_length() == prompt.shape[1]
    bounded = {i for i, slot in enumerate(cache.layers) if isinstance(slot, RecurrentLayer)}
    assert bounded == {*exported.config.rwkv_layers, *case.student.kept_windows}


def test_left_padding_changes_no_logit(case, exported, prompt):
    expected = exported(prompt[:, 5:]).logits
    mask = torch.ones_like(prompt)
    mask[:, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got = exported(prompt, attention_mask=mask, position_ids=positions).logits[:, 5:]
    torch.testing.assert_close(got, expected, rtol=0, atol=case.atol)
    assert not torch.allclose(exported(prompt, position_ids=positions).logits[:, 5:], expected, atol=1e-3)


def test_the_configuration_survives_its_file(case, exported, tmp_path):
    exported.config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == case.family.hybrid
    differs = {i: c.rope for i, c in case.student.mixer_configs.items()}
    assert bool(written["mixer_layers"]) == (len(set(differs.values())) > 1)
    again = type(exported.config).from_pretrained(tmp_path)
    assert again.to_dict() == exported.config.to_dict() | {"_name_or_path": ""}
    made = {i: c.replace(backend="auto", precision="auto") for i, c in case.student.mixer_configs.items()}
    assert {i: again.mixer_config(i) for i in again.rwkv_layers} == made
    for name in ("attention_rope", "attention_log_base", "attention_window", "attention_sinks"):
        assert getattr(again, name) == getattr(case.spec, name)
    teachers = {n: v for n, v in case.original.config.to_dict().items() if n in ("vocab_size", "rope_parameters")}
    assert teachers.items() <= again.to_dict().items()


@pytest.fixture(params=["llama", "qwen3"])
def uneven(request, monkeypatch):
    """A case whose family gives its layers different mixers."""
    family = type(find(request.param))

    class Uneven(family):
        def mixer_config(self, config, layer, preset, **overrides):
            fields = {"rank_decay": 8 * (layer + 1), "norm_eps": 10.0 ** -(layer + 4)}
            return super().mixer_config(config, layer, preset, **overrides | fields)

    monkeypatch.setattr(registry, "import_module", lambda *args: SimpleNamespace(**{family.__name__: Uneven}))
    return _make(Uneven(), teacher(request.param, LAYERS), StudentConfig())


def test_layers_may_have_mixers_of_their_own(uneven, tmp_path, prompt):
    assert [c.rank_decay for c in uneven.student.mixer_configs.values()] == [8, 16, 24]
    assert [m.w1.shape[1] for m in uneven.student.mixers.values()] == [8, 16, 24]
    model = _export(uneven, tmp_path)
    assert model.config.mixer["rank_decay"] == 8
    assert model.config.mixer_layers == {
        "1": {"rank_decay": 16, "norm_eps": 1e-5},
        "2": {"rank_decay": 24, "norm_eps": 1e-6},
    }
    expected = logits(uneven.student, batch_of(prompt), "student")
    torch.testing.assert_close(model(prompt).logits, expected, rtol=0, atol=1e-10)
    check_paths(model, prompt)
