"""The distillation loss against the whole computation with torch's own functions, values and gradients."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from head_problem import TOKENS, VOCAB, WIDTH, Adapted, distill, gradients, problem, teacher_signal
from torch import nn

from rwkvinside.hybrid.quantized_linear import quantize
from rwkvinside.losses.settings import DistillLossConfig
from rwkvinside.teacher.signals import StoredSignal


def whole(hidden, head, labels, teacher_hidden, teacher_weight, o):
    """All logits at once, autograd through torch's log_softmax, kl_div and cross_entropy."""
    chosen = labels != -100
    logits, labels = head(hidden[chosen]), labels[chosen]
    teacher = F.linear(teacher_hidden[chosen], teacher_weight)
    shared = min(logits.shape[1], teacher.shape[1])
    logits, teacher = logits[:, :shared], teacher[:, :shared]
    log_p, log_q = (F.log_softmax(x / o.temperature, -1) for x in (teacher, logits))
    if o.top_k is not None:
        top, ids = log_p.topk(o.top_k)
        log_p = torch.cat([top, log_p.exp().scatter(-1, ids, 0).sum(-1, keepdim=True).log()], -1)
        rest = log_q.exp().scatter(-1, ids, 0).sum(-1, keepdim=True).log()
        log_q = torch.cat([log_q.gather(-1, ids), rest], -1)

    def kl(of, to):
        return F.kl_div(to, of, reduction="sum", log_target=True)

    if o.divergence == "forward":
        value = kl(log_p, log_q)
    elif o.divergence == "reverse":
        value = kl(log_q, log_p)
    else:
        log_m = torch.stack([log_p, log_q]).logsumexp(0) - math.log(2)
        value = (kl(log_p, log_m) + kl(log_q, log_m)) / 2
    value = o.temperature**2 * value
    entropy = F.cross_entropy(logits, labels, reduction="sum")
    agreement = (logits.argmax(-1) == teacher.argmax(-1)).sum()
    return o.kl * value + o.ce * entropy, value, entropy, agreement


CONFIGS = [
    DistillLossConfig(divergence=kind, top_k=top_k, kl=0.7, ce=ce, temperature=temperature)
    for kind in ("forward", "reverse", "js")
    for top_k, ce, temperature in ((None, 0.0, 1.0), (None, 0.3, 2.0), (5, 0.3, 1.0), (5, 0.0, 0.7))
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_chunks_give_what_the_whole_gives(config, dtype):
    """In fp32 as exact as the whole in fp32, both against the whole in fp64."""
    hidden, head, labels, *teacher = problem(dtype)
    hidden.requires_grad_()
    found = whole(hidden, head, labels, *teacher, config)
    rough = gradients(found[0], hidden, head)
    exact_hidden, exact_head = hidden.detach().double().requires_grad_(), copy.deepcopy(head).double()
    expected = whole(exact_hidden, exact_head, labels, *(t.double() for t in teacher), config)
    wanted = gradients(expected[0], exact_hidden, exact_head)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    name = {"forward": "kl", "reverse": "reverse_kl", "js": "js"}[config.divergence]
    for size in (None, 1, 8, 1000):
        chunked = config.model_copy(update=dict(chunk_tokens=size))
        loss, sums = distill(hidden, head, labels, teacher, chunked)
        for got, want in zip((loss, sums[name], sums["ce"], sums["agreement"]), expected, strict=True):
            assert got.item() == pytest.approx(want.item(), rel=tolerance)
        for got, want, near in zip(gradients(loss / 3, hidden, head), wanted, rough, strict=True):
            allowed = max(tolerance * want.norm(), 1.5 * (near - want).norm())
            assert (3 * got - want).norm() <= allowed


@pytest.mark.parametrize("head", [Adapted(), nn.Linear(WIDTH, VOCAB)], ids=["adapted", "bias"])
@pytest.mark.parametrize("config", [CONFIGS[1], CONFIGS[6]], ids=str)
def test_other_heads(head, config):
    hidden, head, labels, *teacher = problem(torch.float64, head=head)
    hidden.requires_grad_()
    trained = [p for p in head.parameters() if p.requires_grad]
    expected = whole(hidden, head, labels, *teacher, config)[0]
    wanted = torch.autograd.grad(expected, [hidden, *trained])
    chunked = config.model_copy(update=dict(chunk_tokens=9))
    loss, _ = distill(hidden, head, labels, teacher, chunked)
    for got, want in zip(torch.autograd.grad(loss, [hidden, *trained]), wanted, strict=True):
        assert (got - want).norm() <= 1e-13 * want.norm()


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_quantized_head(format):
    """Against the same weights dequantized; bitsandbytes' blocks want a width of 64."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"head": nn.Linear(64, VOCAB, bias=False)})
    quantize(model, ["head"], format)
    dense = nn.Linear(64, VOCAB, bias=False).requires_grad_(False)
    dense.weight.copy_(model["head"].unpack())
    hidden = torch.randn(1, TOKENS, 64, requires_grad=True)
    _, _, labels, *teacher = problem()
    expected = whole(hidden, dense, labels, *teacher, DistillLossConfig())[0]
    loss, _ = distill(hidden, model["head"], labels, teacher, DistillLossConfig(chunk_tokens=8))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    (got,), (want,) = torch.autograd.grad(loss, [hidden]), torch.autograd.grad(expected, [hidden])
    assert (got - want).norm() <= 1e-6 * want.norm()


def test_a_head_that_is_the_embedding():
    """Its gradient is the sum of both uses."""
    _, head, labels, *teacher = problem(torch.float64)
    table = head.weight
    ids = torch.arange(TOKENS)[None] % VOCAB

    def gradient(loss_of):
        (found,) = torch.autograd.grad(loss_of(F.embedding(ids, table)), [table])
        return found

    got = gradient(lambda hidden: distill(hidden, head, labels, teacher, DistillLossConfig(chunk_tokens=6))[0])
    want = gradient(lambda hidden: whole(hidden, head, labels, *teacher, DistillLossConfig())[0])
    assert (got - want).norm() <= 1e-13 * want.norm()


@pytest.mark.parametrize("vocab, teacher_vocab", [(VOCAB, VOCAB + 9), (VOCAB + 9, VOCAB)])
def test_a_vocabulary_that_is_padded_further_is_cut(vocab, teacher_vocab):
    hidden, head, labels, *teacher = problem(torch.float64, vocab, teacher_vocab)
    hidden.requires_grad_()
    o = DistillLossConfig(divergence="js", ce=0.1, chunk_tokens=10)
    expected = whole(hidden, head, labels, *teacher, o)[0]
    loss, _ = distill(hidden, head, labels, teacher, o)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for got, want in zip(gradients(loss, hidden, head), gradients(expected, hidden, head), strict=True):
        assert torch.allclose(got, want, atol=1e-13)


def test_top_k_of_all_tokens_is_the_whole_divergence_and_less_is_a_lower_bound():
    hidden, head, labels, *teacher = problem(torch.float64)

    def value(kind, k):
        return distill(hidden, head, labels, teacher, DistillLossConfig(divergence=kind, top_k=k))[0].item()

    for kind in ("forward", "reverse", "js"):
        assert value(kind, VOCAB) == value(kind, None)
        assert value(kind, VOCAB - 1) == pytest.approx(value(kind, None), rel=1e-12)
        values = [value(kind, k) for k in (1, 3, 10, 30, VOCAB)]
        assert values == sorted(values) and values[0] < 0.9 * values[-1]


def test_a_stored_signal_gives_what_the_head_gives():
    hidden, head, labels, teacher_hidden, weight = problem(torch.float32)
    hidden.requires_grad_()
    log_p = F.log_softmax(F.linear(teacher_hidden[labels != -100], weight), -1)
    top, ids = log_p.topk(8)
    rest = log_p.exp().scatter(-1, ids, 0).sum(-1, keepdim=True).log()
    stored = StoredSignal(ids.int(), torch.cat([top, rest], -1).half(), VOCAB)
    for k in (8, 3, None):  # fewer than are stored: the others join the rest
        o = DistillLossConfig(divergence="forward", top_k=k, chunk_tokens=10)
        loss, sums = distill(hidden, head, labels, stored, o)
        expected, _ = distill(hidden, head, labels, (teacher_hidden, weight), DistillLossConfig(top_k=k or 8))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)  # stored in 16 bits
        for got, want in zip(gradients(loss, hidden, head), gradients(expected, hidden, head), strict=True):
            assert (got - want).norm() <= 1e-3 * want.norm()


def test_a_token_that_the_teacher_forbids():
    hidden, head, labels, teacher_hidden, weight = problem()
    hidden.requires_grad_()
    forbidden = torch.zeros(VOCAB)
    forbidden[3] = -math.inf
    labels[labels == 3] = 4
    signal = teacher_signal(labels, teacher_hidden, weight, forbidden)
    for k in (None, 5, VOCAB - 1):
        loss, _ = distill(hidden, head, labels, signal, DistillLossConfig(top_k=k))
        assert math.isfinite(loss.item()) and all(g.isfinite().all() for g in gradients(loss, hidden, head))
