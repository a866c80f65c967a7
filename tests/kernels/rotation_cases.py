"""The Triton kernel of the rotary embedding, alone and in models, in the interpreter or on a GPU. Run by
test_rotation.py, or directly:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/rotation_cases.py
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from hybrid_cases import QUIRKS, VOCAB, packed, teacher
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as rotate_part

from rwkvinside.export.huggingface import build_hybrid
from rwkvinside.families import fused_layers
from rwkvinside.families.fused_layers import FusedRotation, fuse_layers
from rwkvinside.families.registry import FAMILIES
from rwkvinside.hybrid.document_attention import attend_within_documents, run_backbone
from rwkvinside.hybrid.model import HybridModel
from rwkvinside.hybrid.settings import StudentConfig
from rwkvinside.kernels.gpu import kernels, rotation
from rwkvinside.kernels.gpu.rotation import plan_rotate, rotate, why_not
from rwkvinside.modeling.hybrid_qwen3 import HybridQwen3ForCausalLM

INTERPRETED = kernels.INTERPRETED.value
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# relative L2 from float64: three roundings to half of the last bit
ROUNDING = {torch.float32: 3 * 2**-24, torch.float16: 3 * 2**-11, torch.bfloat16: 3 * 2**-8}

CLOSE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # of whole models, whose sums have another order


def inputs(B, T, H, G, N, R=None, dtype=torch.bfloat16, rows=None):
    """Queries and keys as projections leave them, cos and sin whose halves differ, gradients of both results."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=random).to(DEVICE, dtype)

    q, k, dq, dk = (normal(B, T, heads, N).transpose(1, 2) for heads in (H, G, H, G))
    cos, sin = (normal(rows or B, T, R or N) for _ in range(2))
    return (q.requires_grad_(), k.requires_grad_(), cos, sin), (dq, dk)


def results(function, given, grads):
    """Both outputs and both gradients."""
    out = function(*given)
    return [*out, *torch.autograd.grad(out, given[:2], grads)]


def same(found, wanted):
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "B, T, H, G, N, R",
    [
        (2, 7, 4, 2, 16, None),
        (1, 1, 3, 3, 64, None),
        (3, 5, 9, 3, 24, None),  # no powers of two
        (2, 6, 5, 1, 80, None),
        (2, 6, 5, 1, 80, 32),  # a part
        (1, 5, 4, 2, 96, 72),
        (1, 4, 3, 1, 7, 2),
        (1, 2, 40, 8, 256, None),  # more heads than a program has at a time
    ],
)
def test_results_are_those_of_transformers_bit_for_bit(B, T, H, G, N, R, dtype):
    given, grads = inputs(B, T, H, G, N, R, dtype)
    found = results(rotate, given, grads)
    assert same(found, results(rotate_part, given, grads))
    if R is None:
        assert same(found, results(apply_rotary_pos_emb, given, grads))
    double = [[x.detach().double() for x in each] for each in (given, grads)]
    exact = results(rotate_part, [x.requires_grad_() for x in double[0]], double[1])
    for x, y in zip(found, exact, strict=True):
        assert (x.double() - y).norm() <= ROUNDING[dtype] * y.norm()


def test_one_row_of_angles_is_that_of_all():
    given, grads = inputs(3, 5, 4, 2, 16, rows=1)
    q, k, cos, sin = given
    wanted = results(rotate, (q, k, cos.repeat(3, 1, 1), sin.repeat(3, 1, 1)), grads)
    assert same(results(rotate, given, grads), wanted)
    assert same(results(rotate, (q, k, cos.expand(3, 5, 16), sin.expand(3, 5, 16)), grads), wanted)


def test_results_are_new_memory_with_heads_side_by_side():
    """As the projections' are, whatever the layout of what comes in; gradients, too."""
    given, grads = inputs(2, 5, 4, 2, 16)
    before = [x.detach().clone() for x in given]
    for layout in (lambda x: x, torch.Tensor.contiguous):
        turned = [layout(x.detach()).requires_grad_(i < 2) for i, x in enumerate(given)]
        for x in results(rotate, turned, [layout(x) for x in grads]):
            assert x.transpose(1, 2).is_contiguous()
    assert same(given, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_are_taken_as_they_are(dtype):
    """Parts of one product, heads before tokens, every other token, columns that lie apart; a gradient of a sum."""
    (q, k, cos, sin), grads = inputs(2, 6, 4, 2, 16, dtype=dtype)
    wanted = results(rotate_part, (q, k, cos, sin), grads)
    product = torch.cat((q.detach(), k.detach()), 1).transpose(1, 2).contiguous().transpose(1, 2)
    twice = (x.detach().repeat_interleave(2, 2)[:, :, ::2] for x in (q, k))
    columns = (x.detach().repeat_interleave(2, 3)[..., ::2] for x in (q, k))
    for parts in (product.split([4, 2], 1), (q.detach().contiguous(), k.detach().contiguous()), twice, columns):
        given = *(x.requires_grad_() for x in parts), cos.repeat_interleave(2, 2)[..., ::2], sin
        assert same(results(rotate, given, grads), wanted)
    sums = [torch.autograd.grad(sum(x.sum() for x in f(q, k, cos, sin)), (q, k)) for f in (rotate, rotate_part)]
    assert same(*sums)


def test_heads_that_lie_further_apart_than_32_bits_count():
    """Memory that is not written to takes none."""
    given, grads = inputs(1, 3, 3, 1, 16)
    q, *others = given
    apart = torch.empty(2**31 + 48, dtype=q.dtype, device=DEVICE).as_strided(q.shape, (48, 2**30, 16, 1))
    far = apart.copy_(q.detach()).requires_grad_()
    assert same(results(rotate, (far, *others), grads), results(rotate, given, grads))


def test_no_gradient_is_asked_for_where_none_is_needed():
    given, grads = inputs(2, 5, 4, 2, 16)
    wanted = rotate(*given)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            found = rotate(*given)
        assert same(found, wanted) and not found[0].requires_grad
    q, k, *angles = given
    out = rotate(q, k.detach(), *angles)
    assert same(torch.autograd.grad(out, q, grads), results(rotate, given, grads)[2:3])
    dq, dk = torch.autograd.grad(rotate(*given)[0], (q, k), grads[0])  # only one result is read
    assert torch.equal(dq, results(rotate, given, grads)[2]) and not dk.any()


def test_gradients_have_gradients():
    given, grads = inputs(1, 3, 2, 1, 8, 6, torch.float32)
    grads = [x.requires_grad_() for x in grads]
    found, wanted = (
        torch.autograd.grad(torch.autograd.grad(f(*given), given[:2], grads, create_graph=True), grads, given[:2])
        for f in (rotate, rotate_part)
    )
    assert same(found, wanted)


def test_no_tokens_are_none():
    for B, T in ((2, 0), (0, 3)):
        given, grads = inputs(B, T, 4, 2, 16)
        assert [x.shape for x in results(rotate, given, grads)] == [x.shape for x in (*grads, *grads)]


def test_a_pass_is_one_launch():
    given, _ = inputs(2, 5, 40, 2, 16)
    for transposed in (False, True):
        launches, _ = plan_rotate(*given, transposed)
        assert len(launches) == 1 and launches[0].grid == (10,)
        assert not launches[0].options["enable_fp_fusion"], "products would not be rounded"


def test_the_op_is_what_torch_expects():
    given, _ = inputs(2, 5, 4, 2, 16, 12)
    torch.library.opcheck(
        rotation._rotate, (*given, False), test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static")
    )


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"q": torch.zeros(5, 4, 16)}, "q has shape"),
        ({"q": torch.zeros(2, 4, 5, 16, dtype=torch.float64)}, "float64"),
        ({"k": torch.zeros(2, 2, 4, 16)}, "k has shape"),
        ({"k": torch.zeros(2, 2, 5, 8)}, "k has shape"),
        ({"k": torch.zeros(2, 2, 5, 16).half()}, "one dtype"),
        ({"cos": torch.zeros(2, 5, 8)}, "sin"),
        ({"cos": torch.zeros(3, 5, 16), "sin": torch.zeros(3, 5, 16)}, "cos has shape"),
        ({"cos": torch.zeros(2, 5, 15), "sin": torch.zeros(2, 5, 15)}, "15 columns"),
        ({"cos": torch.zeros(2, 5, 18), "sin": torch.zeros(2, 5, 18)}, "18 columns"),
        ({"cos": torch.zeros(2, 5, 16).double()}, "one dtype"),
        ({"sin": torch.zeros(2, 5, 16, device="meta")}, "one device"),
        ({"sin": torch.zeros(2, 5, 16, requires_grad=True)}, "no gradient"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(wrong, said):
    given = {"q": torch.zeros(2, 4, 5, 16), "k": torch.zeros(2, 2, 5, 16)}
    given |= {name: torch.zeros(2, 5, 16) for name in ("cos", "sin")} | wrong
    assert said in why_not(**given)
    with pytest.raises(ValueError, match=said):
        rotate(**given)


@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
def test_a_cuda_graph_records_it():
    (q, k, cos, sin), _ = inputs(2, 7, 4, 2, 16)
    q, k = q.detach(), k.detach()
    rotate(q, k, cos, sin)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = rotate(q, k, cos, sin)
    q.neg_()
    graph.replay()
    assert same(found, rotate_part(q, k, cos, sin))


@pytest.fixture
def calls(monkeypatch):
    """What models ask the kernel for; elsewhere they run as they are."""
    made = []

    def counted(*given):
        made.append(given[0].shape)
        return rotate(*given)

    monkeypatch.setattr(fused_layers, "_rotation", lambda: SimpleNamespace(why_not=why_not, rotate=counted))
    monkeypatch.setattr(fused_layers, "_on_gpu", lambda x: True)
    monkeypatch.setattr(fused_layers, "norm_form", lambda kind: None)
    monkeypatch.setattr(fused_layers, "is_gated", lambda module: False)
    return made


def ids():
    return torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def logits_and_gradients(model):
    logits = model(ids()).logits
    return [logits, *torch.autograd.grad(logits.float().square().sum(), list(model.parameters()), allow_unused=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_models_compute_the_same(family, dtype, calls):
    model = teacher(family).to(DEVICE, dtype)
    wanted = logits_and_gradients(model)
    own = family == "glm4"  # turns pairs that lie side by side
    assert sum(fuse_layers(model).values()) == (0 if own else 3)
    found = logits_and_gradients(model)
    assert torch.equal(found[0], wanted[0]) or not INTERPRETED  # a GPU adds up experts in any order
    for x, y in zip(found, wanted, strict=True):  # the layout of a gradient decides in which order it is summed
        assert x is y is None or (x - y).norm() <= CLOSE[dtype] * y.norm()
    kept = sum(QUIRKS.get(family, {}).get("no_rope_layers", (1, 1, 1)))
    own = own or family == "olmo2" and dtype == torch.bfloat16  # cos and sin stay in fp32
    assert len(calls) == (0 if own else kept)


def test_a_copy_and_a_model_fused_twice(calls):
    model = teacher().to(DEVICE)
    wanted = model(ids()).logits
    assert fuse_layers(model) == {"Qwen3Attention": 3} and fuse_layers(model) == {}
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(other(ids()).logits, wanted) and len(calls) == 3


@pytest.mark.parametrize(
    "kept",
    [{}, {"attention_rope": False}, {"attention_window": 4, "attention_sinks": 1}, {"attention_log_base": 3.0}],
    ids=str,
)
def test_attention_that_a_student_keeps(kept, calls, tmp_path):
    """In training, by hooks, and in the model that is exported, by a class of its own."""
    lm, spec = teacher(), StudentConfig(attention_layers=(0, 1), **kept)
    student = HybridModel.from_teacher(copy.deepcopy(lm), spec).eval()
    source = SimpleNamespace(teacher_config=lambda: lm.config, teacher_id="tiny")
    build_hybrid(copy.deepcopy(student), source, torch.float32, tie_embeddings=None).save_pretrained(tmp_path)
    batch = packed((4, 5)).to(DEVICE)
    wanted = student.to(DEVICE)(batch, mode="student")
    assert fuse_layers(student)["Qwen3Attention"] == 3  # in layer 2 beside the mixer
    assert torch.equal(student(batch, mode="student"), wanted) and len(calls) == 2
    export = HybridQwen3ForCausalLM.from_pretrained(tmp_path).to(DEVICE).eval()
    wanted = export(ids()).logits
    assert fuse_layers(export) == {"KeptQwen3Attention" if kept else "Qwen3Attention": 2}
    assert torch.equal(export(ids()).logits, wanted) and len(calls) == 4


def test_attention_within_documents(calls):
    lm = attend_within_documents(teacher().to(DEVICE))
    batch = packed((4, 5), rows=2).to(DEVICE)
    wanted = run_backbone(lm, batch)
    fuse_layers(lm)
    assert all(isinstance(layer.self_attn, FusedRotation) for layer in lm.model.layers)
    assert torch.equal(run_backbone(lm, batch), wanted) and len(calls) == 3


def test_generation_and_weights_of_attention(calls):
    lm = teacher().to(DEVICE)
    lm.set_attn_implementation("eager")
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    wanted = lm(ids(), output_attentions=True).attentions
    text = lm.generate(ids(), **options)
    fuse_layers(lm)
    found = lm(ids(), output_attentions=True).attentions
    assert len(found) == 3 and same(found, wanted)
    assert torch.equal(lm.generate(ids(), **options), text) and len(calls) == 3 * (1 + 4)
