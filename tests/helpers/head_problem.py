"""Random hidden states, heads and labels for losses at the end of a model."""

import torch
from torch import nn

from rwkvinside.data.batch import Targets
from rwkvinside.hybrid.lm_head import LMHeadLoss
from rwkvinside.losses.distillation import DistillationLoss
from rwkvinside.losses.settings import DistillLossConfig
from rwkvinside.teacher.signals import HeadSignal

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


def linear(weight, bias=None):
    """A frozen head of these weights."""
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None).requires_grad_(False)
    head.weight.data = weight
    if bias is not None:
        head.bias.data = bias
    return head


def teacher_signal(labels, hidden, weight, bias=None):
    return HeadSignal(hidden[labels != -100], linear(weight, bias))


def distill(hidden, head, labels, teacher, config=None, backend="auto"):
    """Loss and metric sums; `teacher` is what `teacher_signal` takes after the labels, or a signal."""
    signal = teacher_signal(labels, *teacher) if isinstance(teacher, list | tuple) else teacher
    return LMHeadLoss(head)(
        hidden, Targets.of(labels), DistillationLoss(signal, config or DistillLossConfig(), backend)
    )


def gradients(loss, hidden, head):
    return torch.autograd.grad(loss, [hidden, *head.parameters()])


class Adapted(nn.Module):
    """A head of another make: a frozen matrix next to a trained low-rank one, and a bias."""

    def __init__(self):
        super().__init__()
        self.out_features = VOCAB
        self.base = nn.Linear(WIDTH, VOCAB)
        self.base.weight.requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, VOCAB, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))
