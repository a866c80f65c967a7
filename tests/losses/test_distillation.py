"""The chunked losses against the whole computation with torch's own functions, values and gradients."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rwkvinside.hybrid.lm_head import LinearHead, open_head
from rwkvinside.hybrid.quantized_linear import quantize
from rwkvinside.losses.distillation import Objective, chunk_tokens, head_losses
from rwkvinside.teacher.signals import CachedTargets, HeadTargets

TOKENS, WIDTH, VOCAB = 41, 24, 97


def problem(dtype=torch.float32, vocab=VOCAB, teacher_vocab=VOCAB, head=None):
    """Hidden states, head, labels with gaps, teacher's hidden states and head."""
    g = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    head = head or nn.Linear(WIDTH, vocab, bias=False)
    head = head.to(dtype)
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(0.5 * normal(*p.shape))
    labels = torch.randint(0, min(vocab, teacher_vocab), (1, TOKENS), generator=g)
    labels[0, ::7] = -100
    return normal(1, TOKENS, WIDTH), head, labels, normal(1, TOKENS, WIDTH + 3), normal(teacher_vocab, WIDTH + 3)


def teacher_targets(labels, hidden, weight):
    return HeadTargets(hidden[labels != -100], lambda: lambda x: F.linear(x, weight))


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


def gradients(loss, hidden, head):
    return torch.autograd.grad(loss, [hidden, *head.parameters()])


OBJECTIVES = [
    Objective(kind, top_k, kl=0.7, ce=ce, temperature=temperature)
    for kind in ("forward", "reverse", "js")
    for top_k, ce, temperature in ((None, 0.0, 1.0), (None, 0.3, 2.0), (5, 0.3, 1.0), (5, 0.0, 0.7))
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_chunks_give_what_the_whole_gives(objective, dtype):
    """In fp32 as exact as the whole in fp32, both against the whole in fp64."""
    hidden, head, labels, *teacher = problem(dtype)
    hidden.requires_grad_()
    found = whole(hidden, head, labels, *teacher, objective)
    rough = gradients(found[0], hidden, head)
    exact_hidden, exact_head = hidden.detach().double().requires_grad_(), copy.deepcopy(head).double()
    expected = whole(exact_hidden, exact_head, labels, *(t.double() for t in teacher), objective)
    wanted = gradients(expected[0], exact_hidden, exact_head)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    name = {"forward": "kl", "reverse": "reverse_kl", "js": "js"}[objective.divergence]
    for size in (None, 1, 8, 1000):
        chunked = replace(objective, chunk_tokens=size)
        loss, sums = head_losses(hidden, head, labels, teacher_targets(labels, *teacher), chunked)
        for got, want in zip((loss, sums[name], sums["ce"], sums["agreement"]), expected, strict=True):
            assert got.item() == pytest.approx(want.item(), rel=tolerance)
        for got, want, near in zip(gradients(loss / 3, hidden, head), wanted, rough, strict=True):
            allowed = max(tolerance * want.norm(), 1.5 * (near - want).norm())
            assert (3 * got - want).norm() <= allowed


class Adapted(nn.Module):
    """A head of another make: a frozen matrix beside a trained low-rank one, and a bias."""

    def __init__(self):
        super().__init__()
        self.out_features = VOCAB
        self.base = nn.Linear(WIDTH, VOCAB)
        self.base.weight.requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, VOCAB, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("head", [Adapted(), nn.Linear(WIDTH, VOCAB)], ids=["adapted", "bias"])
@pytest.mark.parametrize("objective", [OBJECTIVES[1], OBJECTIVES[6]], ids=str)
def test_other_heads(head, objective):
    hidden, head, labels, *teacher = problem(torch.float64, head=head)
    hidden.requires_grad_()
    trained = [p for p in head.parameters() if p.requires_grad]
    expected = whole(hidden, head, labels, *teacher, objective)[0]
    wanted = torch.autograd.grad(expected, [hidden, *trained])
    chunked = replace(objective, chunk_tokens=9)
    loss, _ = head_losses(hidden, head, labels, teacher_targets(labels, *teacher), chunked)
    for got, want in zip(torch.autograd.grad(loss, [hidden, *trained]), wanted, strict=True):
        assert (got - want).norm() <= 1e-13 * want.norm()


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_quantised_head(format):
    """Against the same weights dequantized; bitsandbytes' blocks want a width of 64."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"head": nn.Linear(64, VOCAB, bias=False)})
    quantize(model, ["head"], format)
    dense = nn.Linear(64, VOCAB, bias=False).requires_grad_(False)
    dense.weight.copy_(model["head"].unpack())
    hidden = torch.randn(1, TOKENS, 64, requires_grad=True)
    _, _, labels, *teacher = problem()
    expected = whole(hidden, dense, labels, *teacher, Objective())[0]
    loss, _ = head_losses(hidden, model["head"], labels, teacher_targets(labels, *teacher), Objective(chunk_tokens=8))
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

    targets = teacher_targets(labels, *teacher)
    got = gradient(lambda hidden: head_losses(hidden, head, labels, targets, Objective(chunk_tokens=6))[0])
    want = gradient(lambda hidden: whole(hidden, head, labels, *teacher, Objective())[0])
    assert (got - want).norm() <= 1e-13 * want.norm()


@pytest.mark.parametrize("vocab, teacher_vocab", [(VOCAB, VOCAB + 9), (VOCAB + 9, VOCAB)])
def test_a_vocabulary_that_is_padded_further_is_cut(vocab, teacher_vocab):
    hidden, head, labels, *teacher = problem(torch.float64, vocab, teacher_vocab)
    hidden.requires_grad_()
    o = Objective("js", ce=0.1, chunk_tokens=10)
    expected = whole(hidden, head, labels, *teacher, o)[0]
    loss, _ = head_losses(hidden, head, labels, teacher_targets(labels, *teacher), o)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for got, want in zip(gradients(loss, hidden, head), gradients(expected, hidden, head), strict=True):
        assert torch.allclose(got, want, atol=1e-13)


def test_cross_entropy_alone():
    hidden, head, labels, *_ = problem()
    hidden.requires_grad_()
    expected = F.cross_entropy(head(hidden)[0], labels[0], reduction="sum")
    loss, sums = head_losses(hidden, head, labels, None, Objective(kl=0, ce=1, chunk_tokens=7))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6) and set(sums) == {"ce"}
    for got, want in zip(gradients(loss, hidden, head), gradients(expected, hidden, head), strict=True):
        assert (got - want).norm() <= 1e-6 * want.norm()


def test_top_k_of_all_tokens_is_the_whole_divergence_and_less_is_a_lower_bound():
    hidden, head, labels, *teacher = problem(torch.float64)
    targets = teacher_targets(labels, *teacher)

    def value(kind, k):
        return head_losses(hidden, head, labels, targets, Objective(kind, k))[0].item()

    for kind in ("forward", "reverse", "js"):
        assert value(kind, VOCAB) == value(kind, None)
        assert value(kind, VOCAB - 1) == pytest.approx(value(kind, None), rel=1e-12)
        values = [value(kind, k) for k in (1, 3, 10, 30, VOCAB)]
        assert values == sorted(values) and values[0] < 0.9 * values[-1]


def test_stored_targets_give_what_the_head_gives():
    hidden, head, labels, teacher_hidden, weight = problem(torch.float32)
    hidden.requires_grad_()
    log_p = F.log_softmax(F.linear(teacher_hidden[labels != -100], weight), -1)
    top, ids = log_p.topk(8)
    rest = log_p.exp().scatter(-1, ids, 0).sum(-1, keepdim=True).log()
    stored = CachedTargets(ids.int(), torch.cat([top, rest], -1).half(), VOCAB)
    for k in (8, 3, None):  # fewer than are stored: the others join the rest
        o = Objective("forward", k, chunk_tokens=10)
        loss, sums = head_losses(hidden, head, labels, stored, o)
        expected, _ = head_losses(
            hidden, head, labels, teacher_targets(labels, teacher_hidden, weight), Objective(top_k=k or 8)
        )
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)  # stored in 16 bits
        for got, want in zip(gradients(loss, hidden, head), gradients(expected, hidden, head), strict=True):
            assert (got - want).norm() <= 1e-3 * want.norm()


def test_a_token_that_the_teacher_forbids():
    hidden, head, labels, teacher_hidden, weight = problem()
    hidden.requires_grad_()
    forbidden = torch.zeros(VOCAB)
    forbidden[3] = -math.inf
    labels[labels == 3] = 4
    chosen = teacher_hidden[labels != -100]
    targets = HeadTargets(chosen, lambda: lambda x: F.linear(x, weight) + forbidden)
    for k in (None, 5, VOCAB - 1):
        loss, _ = head_losses(hidden, head, labels, targets, Objective(top_k=k))
        assert math.isfinite(loss.item()) and all(g.isfinite().all() for g in gradients(loss, hidden, head))


def test_nothing_is_prepared_that_nobody_needs(monkeypatch):
    hidden, head, labels, *teacher = problem()
    made = []
    monkeypatch.setattr(LinearHead, "backward", lambda self, *args: made.append(args))
    o, targets = Objective(chunk_tokens=8), teacher_targets(labels, *teacher)
    with torch.no_grad():
        loss, _ = head_losses(hidden.requires_grad_(), head, labels, targets, o)
    frozen, _ = head_losses(hidden.detach(), head.requires_grad_(False), labels, targets, o)
    assert not made and not loss.requires_grad and not frozen.requires_grad
    assert loss.item() == frozen.item() > 0


def test_a_frozen_head_gets_no_gradient_and_a_second_backward_is_refused():
    hidden, head, labels, *teacher = problem()
    head.requires_grad_(False)
    loss, _ = head_losses(hidden.requires_grad_(), head, labels, teacher_targets(labels, *teacher), Objective())
    loss.backward(retain_graph=True)
    assert hidden.grad.any() and head.weight.grad is None
    with pytest.raises(RuntimeError, match="handed out"):
        loss.backward()


@pytest.mark.parametrize("head", [None, Adapted()], ids=["linear", "adapted"])
def test_autocast_multiplies_in_bf16_and_sums_in_fp32(head):
    hidden, head, labels, *teacher = problem(head=head)
    head.requires_grad_(True)
    hidden.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = head_losses(hidden, head, labels, teacher_targets(labels, *teacher), Objective(chunk_tokens=5))
        logits = open_head(head).forward(hidden[0])
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    exact, _ = head_losses(hidden, head, labels, teacher_targets(labels, *teacher), Objective())
    assert loss.item() == pytest.approx(exact.item(), rel=1e-2)
    for got, want in zip(gradients(loss, hidden, head), gradients(exact, hidden, head), strict=True):
        assert got.dtype == want.dtype and (got - want).norm() < 2e-2 * want.norm()


def test_gradients_of_a_bf16_head_add_up_in_fp32():
    """4096 equal contributions to one entry: bf16 sums would stop growing at 256."""
    head = nn.Linear(1, 2, bias=False).bfloat16()
    nn.init.zeros_(head.weight)
    hidden = torch.ones(1, 4096, 1, dtype=torch.bfloat16)
    loss, _ = head_losses(hidden, head, torch.zeros(1, 4096).long(), None, Objective(kl=0, ce=1, chunk_tokens=1))
    (grad,) = torch.autograd.grad(loss, [head.weight])
    assert grad.dtype == torch.bfloat16 and grad.flatten().tolist() == [-2048, 2048]


def test_chunk_size_follows_the_vocabulary():
    assert [chunk_tokens(vocab) for vocab in (512, 151_936, 2**30)] == [98304, 331, 1]
